"""What a draft in training needs of its target besides states: input embeddings, output head and final norm.

They are stored once per directory of features. The embeddings are rows as the target's module gives them, so that
families which scale them need no special case; they are left out where they are the output weight bit for bit.
`StoredTarget` offers them under the names that a `PreTrainedModel` has, so that teacher, initialisation and draft
need not know whether the target is there.

Shapes: B batch, T tokens, D and Dt hidden sizes of draft and target, M rows of states, V vocabulary of the target.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..modeling_eagle3_mla import Eagle3MLADraftModel
from .feature_shards import save_atomically
from .initialization import is_plain_rms_norm
from .target import Lesson, run_decoder, some_tokens, target_logits

CHUNK_ROWS = 4096


class StoredTarget(nn.Module):
    """
    A target without its layers.

    Args:
        config (`PreTrainedConfig`): The target's.
        tensors (`dict[str, torch.Tensor]`): From `head_tensors`.
        eos_token_ids (`list[int]`): With which the target ends a turn.
    """

    def __init__(self, config: PreTrainedConfig, tensors: dict[str, Tensor], eos_token_ids: list[int]):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig(eos_token_id=eos_token_ids)
        weight = tensors["output.weight"]
        self.output = nn.Linear(*weight.shape[::-1], bias="output.bias" in tensors, device="meta")
        self.output.weight = nn.Parameter(weight)
        if "output.bias" in tensors:
            self.output.bias = nn.Parameter(tensors["output.bias"])
        self.embeddings = nn.Embedding.from_pretrained(tensors.get("embeddings.weight", weight))
        # Under the name where families keep it; without a plain RMSNorm there is nothing that a draft could take over.
        self.norm = None
        if "norm.weight" in tensors:
            self.norm = nn.RMSNorm(len(tensors["norm.weight"]), eps=1e-6, device="meta")
            self.norm.weight = nn.Parameter(tensors["norm.weight"])
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, config: PreTrainedConfig, eos_token_ids: list[int], device: torch.device):
        """The target whose `head_tensors` are in the file at `path`."""
        return cls(config, load_file(path), eos_token_ids).to(device)

    @property
    def dtype(self) -> torch.dtype:
        return self.output.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def get_decoder(self) -> "StoredTarget":
        """The owner of the final norm."""
        return self


class StoredTeacher:
    """
    A teacher that reads what the target said earlier; same methods as `Teacher`, and no target.

    Args:
        target ([`StoredTarget`]): Head and embeddings.
        draft (`Eagle3MLADraftModel`): Who is taught.

    Raises:
        ValueError: If the draft does not fit the target.
    """

    def __init__(self, target: StoredTarget, draft: Eagle3MLADraftModel):
        draft.check_target(target)
        self.target = target
        self.draft = draft

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """The target's embeddings of `input_ids`, for a draft without its own, `(B, T, D)`."""
        return self.draft.embed(input_ids, self.target)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """The target's logits of last hidden states, `(M, Dt) -> (M, V)`."""
        return target_logits(self.target, states)

    def lesson(self, batch: dict[str, Tensor]) -> Lesson:
        """The states that the batch brings along, as `Teacher.lesson` would give them."""
        weight = self.draft.fc.weight
        aux_hidden_states = batch["aux_hidden_states"].to(weight.device, weight.dtype)
        output = self.target.output.weight
        return Lesson(aux_hidden_states, batch["last_hidden_states"].to(output.device, output.dtype))


@torch.no_grad()
def head_tensors(target: PreTrainedModel) -> dict[str, Tensor]:
    """
    Everything that a [`StoredTarget`] is made of, on the CPU.

    Raises:
        ValueError: If the target's output layer is not a plain matrix product.
    """
    output = target.get_output_embeddings()
    tensors = {"output.weight": output.weight.detach().cpu()}
    if getattr(output, "bias", None) is not None:
        tensors["output.bias"] = output.bias.detach().cpu()
    embeddings = embedding_rows(target)
    if not (embeddings.shape == output.weight.shape and torch.equal(embeddings, tensors["output.weight"])):
        tensors["embeddings.weight"] = embeddings
    norm = getattr(target.get_decoder(), "norm", None)
    hidden_size = target.config.get_text_config(decoder=True).hidden_size
    if norm is not None and is_plain_rms_norm(norm, hidden_size):
        tensors["norm.weight"] = norm.weight.detach().cpu()
    check_output_layer(target, tensors)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def embedding_rows(target: PreTrainedModel) -> Tensor:
    """What the target's embedding module gives for every token, `(V, Dt)`."""
    embedding = target.get_input_embeddings()
    device = embedding.weight.device
    token_ids = torch.arange(target.config.get_text_config(decoder=True).vocab_size, device=device)
    return torch.cat([embedding(chunk[None])[0].cpu() for chunk in token_ids.split(CHUNK_ROWS)])


def check_output_layer(target: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """
    Compares the logits of the stored head with the target's on a few states.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    states = run_decoder(target, some_tokens(target))[0]
    expected = target_logits(target, states).float().cpu()
    stored = StoredTarget(target.config, tensors, []).to(states.device)
    difference = (target_logits(stored, states).float().cpu() - expected).abs().max() / expected.abs().max()
    if not difference <= (1e-4 if target.dtype == torch.float32 else 2e-2):
        raise ValueError(
            f"The output layer of {type(target).__name__} ({type(target.get_output_embeddings()).__name__}) is not a "
            f"product with its weight (relative difference {difference:.1e}), so its logits cannot be recomputed from "
            "stored states. Load the target unquantised and without adapters, or train with `--dataset`."
        )


def save_head(target: PreTrainedModel, path: Path) -> str:
    """Writes `head_tensors` to `path`; returns the file's SHA-256."""
    return save_atomically(head_tensors(target), path, {"format": "pt"})
