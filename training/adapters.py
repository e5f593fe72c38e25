"""Adapters: LoRA (arXiv:2106.09685) on a trained draft, so that one head serves many domains.

An adapter is a `peft` directory like any other: `PeftModel.from_pretrained(draft, directory)` loads it,
`merge_and_unload()` bakes it in, `set_adapter` switches between several, and `generate(assistant_model=...)` takes the
wrapped draft as it takes the draft itself. `peft` is needed for this module's functions only.
"""

from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from ..modeling_eagle3_mla import Eagle3MLADraftModel
from .arguments import DraftArguments

ADAPTER_CONFIG = "adapter_config.json"
# Not adapted unless it is named: it came from the target, and at rank r it is the largest adapter of all.
OUTPUT_HEAD = "lm_head"

# What the card of a draft says -> what that of an adapter says.
ADAPTER_TEXT = {
    "# EAGLE-3 draft head for ": "# Adapter of an EAGLE-3 draft head for ",
    "from transformers import AutoModel,": "from peft import PeftModel\nfrom transformers import AutoModel,",
    'draft = AutoModel.from_pretrained("<this repository>", trust_remote_code=True)': (
        'head = AutoModel.from_pretrained("{base}", trust_remote_code=True)\n'
        'draft = PeftModel.from_pretrained(head, "<this repository>")'
    ),
    "\nIt has ": "\nIt is a LoRA adapter of `{base}`, which has ",
}


def require_peft() -> None:
    """
    Raises:
        ValueError: If `peft` is not installed.
    """
    if not is_peft_available():
        raise ValueError("`--lora-rank` needs the package peft. Install it: pip install 'eagle3-mla[peft]'")


def add_adapter(draft: Eagle3MLADraftModel, settings: DraftArguments) -> PreTrainedModel:
    """
    Wraps a trained draft in a fresh adapter; only the adapter is trained.

    Args:
        draft (`Eagle3MLADraftModel`): The head. **Effects**: its linear layers are replaced by adapted ones.
        settings ([`DraftArguments`]): Rank, scale and places.

    Returns:
        `peft.PeftModel`, which computes what `draft` computed: the second factor of each adapter is zero.

    Raises:
        ValueError: If `peft` is missing, or a place is no linear layer of the draft.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,
        target_modules=adapted_modules(draft, settings.lora_target_modules),
        base_model_name_or_path=draft.config.name_or_path,
    )
    return get_peft_model(draft, config)


def adapted_modules(draft: Eagle3MLADraftModel, names: list[str] | None) -> list[str]:
    """
    Names of the linear layers that get an adapter: those asked for, or all but the output head.

    Raises:
        ValueError: If the draft has no linear layer of a name.
    """
    linear = {name.rpartition(".")[2] for name, module in draft.named_modules() if isinstance(module, nn.Linear)}
    if names is None:
        return sorted(linear - {OUTPUT_HEAD})
    unknown = sorted(set(names) - linear)
    if unknown:
        raise ValueError(f"`--lora-target-modules` must be among {sorted(linear)}, got {unknown}.")
    return sorted(set(names))


def adapter_card(card: str, base: str) -> str:
    """
    The card of an adapter, from what the card of the whole draft would be.

    Args:
        card (`str`): From `model_card`.
        base (`str`): The head that the adapter belongs to, a Hub id or a local directory.
    """
    for text, replacement in ADAPTER_TEXT.items():
        assert card.count(text) == 1
        card = card.replace(text, replacement.format(base=base))
    adapted = ModelCard(card)
    adapted.data.library_name = "peft"
    adapted.data.tags = [*adapted.data.tags, "lora"]
    # A local path is no model id; the Hub would refuse it.
    adapted.data.base_model = None if Path(base).exists() else base
    return str(adapted)


def base_draft(model: nn.Module) -> Eagle3MLADraftModel:
    """The draft itself, below an adapter if there is one."""
    return model if isinstance(model, Eagle3MLADraftModel) else model.get_base_model()


def is_adapter(directory: Path) -> bool:
    """True if `directory` holds an adapter rather than a draft."""
    return (directory / ADAPTER_CONFIG).is_file()


def check_same_kind(settings: DraftArguments, checkpoint: Path) -> None:
    """
    Requires that an adapter goes on as an adapter, and a draft as a draft.

    Raises:
        ValueError: If the checkpoint holds the other one.
    """
    if is_adapter(checkpoint) != (settings.lora_rank is not None):
        held, asked = ("an adapter", "a draft") if is_adapter(checkpoint) else ("a draft", "an adapter")
        raise ValueError(
            f"{checkpoint} holds {held} but the arguments train {asked}. Resume with the arguments of the interrupted "
            "run."
        )


def check_same_adapter(model: nn.Module, checkpoint: Path) -> None:
    """
    Requires that the adapter to be trained is the one in the checkpoint.

    Raises:
        ValueError: Names the first field that differs.
    """
    from peft import PeftConfig

    saved, config = PeftConfig.from_pretrained(checkpoint), model.peft_config["default"]
    for name in ("base_model_name_or_path", "r", "lora_alpha", "target_modules"):
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(
                f"`{name}` is {getattr(saved, name)} in {checkpoint} but {getattr(config, name)} by the arguments. "
                "Resume with the arguments of the interrupted run."
            )
