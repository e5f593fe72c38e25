"""A run that learns from stored features: what must fit together, and which teacher a run has."""

import logging
from dataclasses import fields
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_eagle3_mla import Eagle3MLAConfig
from ..modeling_eagle3_mla import Eagle3MLADraftModel
from .arguments import DataArguments, DraftArguments, Eagle3TrainingArguments
from .document_teacher import DocumentTeacher
from .feature_manifest import HEAD_NAME, SETTLED_BY_PREPARATION, Manifest, check_same_target
from .features import FeatureDataset, open_features
from .rope_lengths import length_of_fixed_rope
from .stored_target import StoredTarget, StoredTeacher
from .target import Teacher

logger = logging.getLogger(__name__)


def features_of_run(
    data: DataArguments, settings: DraftArguments, args: Eagle3TrainingArguments, config: Eagle3MLAConfig
) -> FeatureDataset:
    """
    The stored features of a training run, checked against its arguments and verified.

    Args:
        data ([`DataArguments`]): With `features`. **Effects**: becomes that of the preparation.
        settings ([`DraftArguments`]): Names the target.
        args ([`Eagle3TrainingArguments`]): Of the run.
        config ([`Eagle3MLAConfig`]): The draft's.

    Raises:
        ValueError: If the features are of another target, are not what the draft reads, or are damaged; or if an
            argument contradicts them.
    """
    manifest = Manifest.read(Path(data.features))
    check_arguments(data, settings, args, manifest)
    check_same_target(manifest, settings.model_path)
    layer_ids = manifest.request.eagle_aux_hidden_state_layer_ids
    if layer_ids != config.eagle_aux_hidden_state_layer_ids:
        raise ValueError(
            f"The features in {data.features} hold the states before the layers {layer_ids}, the draft's "
            f"`eagle_aux_hidden_state_layer_ids` are {config.eagle_aux_hidden_state_layer_ids}. Prepare them anew."
        )
    show_progress = args.process_index == 0 and not args.disable_tqdm
    features = open_features(data.features, args.process_index, args.world_size, show_progress)
    for name in SETTLED_BY_PREPARATION:
        setattr(data, name, manifest.data[name])
    return features


def check_arguments(
    data: DataArguments, settings: DraftArguments, args: Eagle3TrainingArguments, manifest: Manifest
) -> None:
    """
    Refuses arguments that stored features cannot obey.

    Raises:
        ValueError: Names the first one.
    """
    for field in fields(data):
        if field.name in SETTLED_BY_PREPARATION and getattr(data, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise ValueError(f"`--{flag}` was settled when the features were prepared. Leave it out.")
    stored = manifest.request.target_dtype
    if settings.target_dtype not in ("auto", stored):
        raise ValueError(
            f"`--target-dtype` must be {stored}, as the features were prepared, got {settings.target_dtype}."
        )
    if settings.target_device_map is not None or settings.shard_target or args.diagnose:
        raise ValueError(
            "`--target-device-map`, `--shard-target` and `--diagnose` need the target, which is not loaded with "
            "`--features`. Leave them out, or give `--dataset`."
        )


def load_stored_target(
    features: FeatureDataset, target_config: PreTrainedConfig, device: torch.device
) -> StoredTarget:
    """Head and embeddings of the target that the features come from."""
    return StoredTarget.load(features.directory / HEAD_NAME, target_config, features.manifest.eos_token_ids, device)


def choose_teacher(
    target: PreTrainedModel | StoredTarget, draft: Eagle3MLADraftModel, settings: DraftArguments, longest: int
) -> Teacher | StoredTeacher:
    """
    The teacher for a target that is there, or for what was stored of it.

    Args:
        target (`PreTrainedModel` or [`StoredTarget`]): Who teaches.
        draft (`Eagle3MLADraftModel`): Who is taught.
        settings ([`DraftArguments`]): How the target reads, unless that would let texts depend on their neighbours.
        longest (`int`): Tokens of the longest document.

    Raises:
        ValueError: If a sharded target would have to read documents one by one.
    """
    if isinstance(target, StoredTarget):
        return StoredTeacher(target, draft)
    if settings.target_forward == "document":
        return DocumentTeacher(target, draft)
    fixed_length = length_of_fixed_rope(target.config)
    if fixed_length is None or longest <= fixed_length:
        return Teacher(target, draft)
    if settings.shard_target:
        raise ValueError(
            f"`--shard-target` needs documents of at most {fixed_length} tokens, got {longest}: longer ones are read "
            f"one by one, as the RoPE of {type(target).__name__} depends on their length. Lower `--max-length`."
        )
    logger.warning(
        "The RoPE of %s depends on the length of texts of more than %d tokens, and the longest document has %d: it "
        "reads documents one by one.",
        type(target).__name__,
        fixed_length,
        longest,
    )
    return DocumentTeacher(target, draft)
