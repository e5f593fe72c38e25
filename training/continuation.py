"""Training that goes on from a trained draft: its shape, its vocabulary and its weights are kept."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..configuration_eagle3_mla import Eagle3MLAConfig
from .arguments import DraftArguments
from .files import intact_weights
from .ttt import TTTDraftModel


def trained_config(settings: DraftArguments) -> Eagle3MLAConfig:
    """
    The configuration of `--draft-checkpoint`.

    Raises:
        ValueError: If it cannot be read, or other arguments describe another draft.
    """
    source = settings.draft_checkpoint
    model_type = _stored_type(source)
    if model_type != Eagle3MLAConfig.model_type:
        raise ValueError(
            f"`--draft-checkpoint` must be a draft of type {Eagle3MLAConfig.model_type}, got {model_type} in {source}."
        )
    config = Eagle3MLAConfig.from_pretrained(source)
    if settings.attention_type != config.attention_type:
        raise ValueError(
            f'`--attention-backend` {settings.attention_backend} trains "{settings.attention_type}" attention, but '
            f'{source} has "{config.attention_type}".'
        )
    for name in ("draft_vocab_size", "mla_latent_dim", "mla_rope_dim"):
        asked = getattr(settings, name)
        if name == "draft_vocab_size" and asked is not None:
            asked = settings.num_draft_tokens(config.vocab_size)
        if asked is not None and asked != getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"`{flag}` must be {getattr(config, name)}, as in {source}, or left out, got {asked}.")
    for name in ("embed_residual", "fc_norm", "norm_output"):
        if getattr(settings, name) and not getattr(config, name):
            raise ValueError(f"`--{name.replace('_', '-')}` must be left out: {source} was trained without it.")
    return config


def _stored_type(source: str) -> str | None:
    """`model_type` of the draft in a directory or on the Hub. Raises `ValueError` if there is none to read."""
    if source.startswith((".", "/", "~")) and not Path(source).exists():
        raise ValueError(f"The draft {source} does not exist: `--draft-checkpoint` must be a directory or a Hub id.")
    try:
        return PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The draft {source} cannot be loaded: {reason}") from error


def load_trained_draft(settings: DraftArguments) -> TTTDraftModel:
    """
    The draft of `--draft-checkpoint` in float32, ready to be trained on.

    Raises:
        ValueError: If its weights cannot be read, or are not finite.
    """
    source = settings.draft_checkpoint
    if Path(source).is_dir():
        source = str(Path(source).resolve())
    with intact_weights(source):
        draft = TTTDraftModel.from_pretrained(
            source, dtype=torch.float32, attn_implementation=settings.attn_implementation
        )
    for name, weight in draft.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"`{name}` of the draft {source} holds a number that is not finite. Give another draft.")
    return draft
