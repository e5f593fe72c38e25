"""A small trained target and its head in the shape of large ones, function unchanged: real acceptance at real cost.

What a round costs depends on shapes, what it accepts on training. Where no trained weights of the shape of interest
are at hand, a twin has both: it is as wide and as deep as asked for, and says token for token what the small model
says. Added layers write zeros; widening.py tells the rest. Matrices are random wherever that changes nothing, so that
they cost what trained ones cost; the command prints how much of each kind is zero. The vocabulary stays: what a larger
one costs must be measured separately.

    python benchmarks/twin.py --target-model-path <target> --draft-checkpoint <head> --output-dir outputs/twin

gives both the shape of Llama-3.1-8B in bf16. In a program:

    twin = widen_target(target, TwinShape(), torch.bfloat16, "cuda")
    twin_draft = widen_draft(draft, twin.config, dtype=torch.bfloat16, device="cuda")
"""

import argparse
import copy
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from widening import (
    ZERO,
    HeadPlaces,
    Layout,
    added_heads,
    neurons,
    padded,
    place_heads,
    side_by_side,
    write_embedding,
    write_head,
    write_linear,
    write_norm,
)
from widening_layers import write_grouped_attention, write_latent_attention, write_mlp

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig, default_aux_layer_ids
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

# RoPE types whose frequency of a pair follows from the base and i / d alone.
SCALABLE_ROPE_TYPES = ("default", "linear", "llama3")
MLA_SIZES = ("mla_latent_dim", "mla_rope_dim", "mla_q_lora_rank")


@dataclass(frozen=True)
class TwinShape:
    """
    The shape of the large target; the default is Llama-3.1-8B, whose `lm_head` is not tied either.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim (`int`):
            As in `LlamaConfig`; none may be below the small target's.
        tie_word_embeddings (`bool`):
            Possible where the small target's are tied. They have zeros where an `lm_head` of its own is random.
    """

    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    tie_word_embeddings: bool = False


def widen_target(
    target: LlamaForCausalLM,
    shape: TwinShape,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LlamaForCausalLM:
    """
    The target in another shape: same logits, same states at the places where a head reads them, padded with zeros.

    Args:
        target (`LlamaForCausalLM`): The small target.
        shape ([`TwinShape`]): What it is widened to.
        dtype (`torch.dtype`, *optional*), device (`torch.device`, *optional*): Default: the small target's.

    Raises:
        ValueError: If the target is no Llama, or does not fit into the shape.
    """
    if target.config.model_type != "llama":
        raise ValueError(f"`target` must be a Llama, got {target.config.model_type!r}.")
    twin = make_twin(target, twin_target_config(target.config, shape), dtype, device)
    hidden = padded(target.config.hidden_size, shape.hidden_size)
    write_embedding(twin.model.embed_tokens, target.model.embed_tokens, hidden)
    write_norm(twin.model.norm, target.model.norm, hidden)
    if not shape.tie_word_embeddings:
        write_head(twin.lm_head, target.lm_head, hidden)
    places = place_layers(target.config.num_hidden_layers, shape.num_hidden_layers)
    small_layers = dict(zip(places, target.model.layers, strict=True))
    for index, layer in enumerate(twin.model.layers):
        write_target_layer(layer, small_layers.get(index), target.config, twin.config, hidden)
    return twin


def write_target_layer(
    layer: nn.Module, small: nn.Module | None, config: LlamaConfig, twin_config: LlamaConfig, hidden: Layout
) -> None:
    """A layer of the twin; an added one where `small` is `None`."""
    if small is None:
        nothing = Layout(torch.full_like(hidden.entries, ZERO))
        heads = added_heads(twin_config.num_attention_heads, twin_config.num_key_value_heads)
        write_grouped_attention(layer.self_attn, None, heads, hidden, nothing)
        write_mlp(layer.mlp, None, neurons(0, twin_config.intermediate_size), hidden, nothing)
        return
    for name in ("input_layernorm", "post_attention_layernorm"):
        write_norm(getattr(layer, name), getattr(small, name), hidden)
    write_grouped_attention(layer.self_attn, small.self_attn, heads_of(config, twin_config), hidden, hidden)
    mlp_layouts = neurons(config.intermediate_size, twin_config.intermediate_size)
    write_mlp(layer.mlp, small.mlp, mlp_layouts, hidden, hidden)


def widen_draft(
    draft: Eagle3MLADraftModel,
    twin_config: LlamaConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **mla_sizes: int,
) -> Eagle3MLADraftModel:
    """
    The head in the shape of a head for the twin: same logits, same states, padded with zeros.

    Args:
        draft ([`Eagle3MLADraftModel`]): The small head.
        twin_config (`LlamaConfig`): Of the target from `widen_target`.
        dtype (`torch.dtype`, *optional*), device (`torch.device`, *optional*): Default: the small head's.
        mla_sizes:
            `mla_latent_dim`, which by default is that of a new head for the twin, `G * d / 4`; `mla_rope_dim` and
            `mla_q_lora_rank`, by default unchanged. Each must be a multiple of the small head's.

    Raises:
        ValueError: If the head has another width than its target, or does not fit into the shape.
    """
    small_config = draft.config
    twin = make_twin(draft, twin_draft_config(small_config, twin_config, mla_sizes), dtype, device)
    hidden = padded(small_config.hidden_size, twin.config.hidden_size)
    if small_config.has_own_embeddings:
        write_embedding(twin.embed_tokens, draft.embed_tokens, hidden)
    if small_config.fc_norm:
        for norm, small_norm in zip(twin.fc_norm, draft.fc_norm, strict=True):
            write_norm(norm, small_norm, hidden)
    write_linear(twin.fc, draft.fc, hidden, side_by_side(hidden, hidden, hidden))
    for layer, small in zip(twin.layers, draft.layers, strict=True):
        write_draft_layer(layer, small, small_config, twin.config, hidden)
    write_norm(twin.norm, draft.norm, hidden)
    write_head(twin.lm_head, draft.lm_head, hidden)
    twin.d2t.copy_(draft.d2t)
    twin.t2d.copy_(draft.t2d)
    twin.generation_package = draft.generation_package
    return twin


def write_draft_layer(
    layer: nn.Module, small: nn.Module, config: Eagle3MLAConfig, twin_config: Eagle3MLAConfig, hidden: Layout
) -> None:
    """A layer of the twin's head."""
    attention_input = hidden
    write_norm(layer.input_layernorm, small.input_layernorm, hidden)
    write_norm(layer.post_attention_layernorm, small.post_attention_layernorm, hidden)
    if small.is_first:
        attention_input = side_by_side(hidden, hidden)
        write_norm(layer.hidden_norm, small.hidden_norm, hidden)
    if small.takes_embedding:
        write_linear(layer.embed_proj, small.embed_proj, hidden, hidden)
    write_attention = write_latent_attention if config.attention_type == "mla" else write_grouped_attention
    write_attention(layer.self_attn, small.self_attn, heads_of(config, twin_config), attention_input, hidden)
    mlp_layouts = neurons(config.intermediate_size, twin_config.intermediate_size)
    write_mlp(layer.mlp, small.mlp, mlp_layouts, hidden, hidden)


def make_twin(small: PreTrainedModel, config, dtype, device) -> PreTrainedModel:
    """A model with random weights, made where it will be, that is used as the small one is."""
    dtype = small.dtype if dtype is None else dtype
    with torch.device(small.device if device is None else device):
        twin = type(small)._from_config(config, dtype=dtype, attn_implementation=small.config._attn_implementation)
    twin.generation_config = copy.deepcopy(small.generation_config)
    return twin.train(small.training)


def heads_of(config, twin_config) -> HeadPlaces:
    """Where the heads of `config`, a target's or a head's, go."""
    return place_heads(
        *(config.num_attention_heads, config.num_key_value_heads),
        *(twin_config.num_attention_heads, twin_config.num_key_value_heads),
    )


def twin_target_config(config: LlamaConfig, shape: TwinShape) -> LlamaConfig:
    """The small target's configuration in another shape."""
    sizes = {name: value for name, value in asdict(shape).items() if name != "tie_word_embeddings"}
    if shape.tie_word_embeddings and not config.tie_word_embeddings:
        raise ValueError("`tie_word_embeddings` of the twin must be False, as the small target's, got True.")
    check_sizes(config, sizes)
    check_rope(config, "head_dim", sizes)
    return config_with(config, **asdict(shape), rms_norm_eps=twin_epsilon(config, shape.hidden_size))


def twin_draft_config(config: Eagle3MLAConfig, twin_config: LlamaConfig, mla_sizes: dict[str, int]) -> Eagle3MLAConfig:
    """The small head's configuration for the twin of its target."""
    check_head(config, twin_config)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {name: getattr(twin_config, name) for name in names}
    check_sizes(config, sizes)
    if config.attention_type == "mla":
        latent_dim = twin_config.num_key_value_heads * twin_config.head_dim // 4
        unchanged = {"mla_rope_dim": config.mla_rope_dim, "mla_q_lora_rank": config.mla_q_lora_rank}
        sizes |= {"mla_latent_dim": latent_dim} | unchanged | mla_sizes
        check_multiple(config, "mla_latent_dim", sizes)
        check_multiple(config, "mla_q_lora_rank", sizes)
        check_multiple(config, "mla_rope_dim", sizes)
    elif mla_sizes:
        raise ValueError(f'{sorted(mla_sizes)} belong to `attention_type="mla"`, the head has "gqa".')
    check_rope(config, "mla_rope_dim" if config.mla_rope_dim > 0 else "head_dim", sizes)
    return config_with(
        config,
        target_hidden_size=twin_config.hidden_size,
        target_num_hidden_layers=twin_config.num_hidden_layers,
        eagle_aux_hidden_state_layer_ids=twin_aux_layer_ids(config, twin_config.num_hidden_layers),
        rms_norm_eps=twin_epsilon(config, twin_config.hidden_size),
        **sizes,
    )


def config_with(config, **changes):
    """A configuration of the same class with other values."""
    return type(config).from_dict(config.to_dict() | changes)


def twin_epsilon(config, hidden_size: int) -> float:
    """The epsilon that suits a mean square over more entries."""
    return config.rms_norm_eps * config.hidden_size / hidden_size


def check_head(config: Eagle3MLAConfig, twin_config: LlamaConfig) -> None:
    """
    Raises:
        ValueError: If the head cannot be widened at all, or is another target's.
    """
    if config.hidden_size != config.target_hidden_size:
        raise ValueError(
            f"The head's `hidden_size` must be its target's ({config.target_hidden_size}), got {config.hidden_size}: "
            "one epsilon cannot suit norms that are widened by different factors."
        )
    if config.target_num_hidden_layers is None:
        raise ValueError(
            "The head's `target_num_hidden_layers` must be known, got None. Write its target's into its config.json."
        )
    if config.vocab_size != twin_config.vocab_size:
        raise ValueError(
            f"The twin's `vocab_size` must be the head's ({config.vocab_size}), got {twin_config.vocab_size}."
        )


def check_sizes(config, sizes: dict[str, int]) -> None:
    """
    Raises:
        ValueError: If one of `sizes` is below that of `config`.
    """
    for name, value in sizes.items():
        if value < getattr(config, name):
            raise ValueError(f"`{name}` of the twin must be at least {getattr(config, name)}, got {value}.")


def check_multiple(config, name: str, sizes: dict[str, int]) -> None:
    """
    Raises:
        ValueError: If the size `name` is no multiple of that of `config`, or has no counterpart there.
    """
    small, value = getattr(config, name) or 0, sizes[name] or 0
    if value != small and (small == 0 or value < small or value % small != 0):
        raise ValueError(f"`{name}` of the twin must be a multiple of the small model's ({small}), got {value}.")


def check_rope(config, name: str, sizes: dict[str, int]) -> None:
    """
    Raises:
        ValueError: If the pairs of a head of width `name` keep their frequencies at no place of a wider one.
    """
    check_multiple(config, name, sizes)
    rope_type = config.rope_parameters["rope_type"]
    if sizes[name] != getattr(config, name) and rope_type not in SCALABLE_ROPE_TYPES:
        raise ValueError(
            f"`{name}` of the twin must be {getattr(config, name)} with RoPE of the type {rope_type!r}, got "
            f"{sizes[name]}: only with {SCALABLE_ROPE_TYPES} do pairs of a wider head have the same frequencies."
        )


def place_layers(num_layers: int, twin_num_layers: int) -> list[int]:
    """
    Where the small target's layers stand among the twin's, so that the default places of a head fit both.

    The places cut each target into four parts, and a part begins with the small one's layers. If one part of the twin
    is too small, all added layers come last.
    """
    starts = [0, *default_aux_layer_ids(num_layers), num_layers]
    twin_starts = [0, *default_aux_layer_ids(twin_num_layers), twin_num_layers]
    places = []
    for part in range(4):
        size = starts[part + 1] - starts[part]
        if size > twin_starts[part + 1] - twin_starts[part]:
            return list(range(num_layers))
        places += range(twin_starts[part], twin_starts[part] + size)
    return places


def twin_aux_layer_ids(config: Eagle3MLAConfig, twin_num_layers: int) -> list[int]:
    """The twin's places where the residual stream is that of the head's own places, default ones if possible."""
    places = place_layers(config.target_num_hidden_layers, twin_num_layers)
    num_before = [sum(place < index for place in places) for index in range(twin_num_layers + 1)]
    candidates = [
        {index for index in range(twin_num_layers + 1) if num_before[index] == layer_id}
        for layer_id in config.eagle_aux_hidden_state_layer_ids
    ]
    default = default_aux_layer_ids(twin_num_layers)
    return [index if index in allowed else min(allowed) for index, allowed in zip(default, candidates, strict=True)]


def zero_shares(model: nn.Module) -> dict[str, float]:
    """For each kind of matrix, the share of zeros over all layers."""
    zeros, sizes = defaultdict(int), defaultdict(int)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            zeros[kind] += weight.numel() - int(weight.count_nonzero())
            sizes[kind] += weight.numel()
    return {kind: zeros[kind] / sizes[kind] for kind in sizes}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-model-path", required=True)
    parser.add_argument("--draft-checkpoint", help="the target's head")
    parser.add_argument("--output-dir", required=True, type=Path, help="gets the folders `target` and `draft`")
    for field in fields(TwinShape):
        if field.type is int:
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--tie-word-embeddings", action="store_true")
    for name in MLA_SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32", "float64"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random values")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    shape = TwinShape(**{field.name: getattr(arguments, field.name) for field in fields(TwinShape)})
    target = AutoModelForCausalLM.from_pretrained(arguments.target_model_path)
    twin = widen_target(target, shape, dtype, arguments.device)
    save(twin, arguments.output_dir / "target")
    AutoTokenizer.from_pretrained(arguments.target_model_path).save_pretrained(arguments.output_dir / "target")
    if arguments.draft_checkpoint:
        draft = Eagle3MLADraftModel.from_pretrained(arguments.draft_checkpoint)
        mla_sizes = {name: value for name, value in vars(arguments).items() if name in MLA_SIZES}
        twin_draft = widen_draft(draft, twin.config, dtype, arguments.device, **mla_sizes)
        save(twin_draft, arguments.output_dir / "draft")


def save(twin: PreTrainedModel, directory: Path) -> None:
    """Writes a twin and says what of it is zero."""
    twin.save_pretrained(directory)
    print(f"{directory}: share of zeros")
    for kind, share in zero_shares(twin).items():
        print(f"  {share:6.1%}  {kind}")


if __name__ == "__main__":
    main()
