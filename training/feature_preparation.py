"""The command that stores a target's features, so that drafts can be trained where the target is not.

The target reads every document alone, so that what is stored of it depends neither on its neighbours nor on the number
of processes nor on interruptions. Shards are dealt out to the processes in turn; each is written complete or not at
all, and a second run of the same command writes what is missing or damaged.

Shapes: T tokens of a document, Dt the target's hidden.
"""

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedConfig, PreTrainedModel

from ..configuration_eagle3_mla import Eagle3MLAConfig
from ..modeling_eagle3_mla import AuxHiddenStates
from .arguments import DataArguments, DraftArguments
from .cli import check_writable, load_target_config
from .data import content_hash, end_of_turn_ids, load_generation_config, prepare_rows
from .document_teacher import read_document
from .feature_manifest import (
    FORMAT_VERSION,
    HEAD_NAME,
    MANIFEST_NAME,
    RECEIPTS_DIRECTORY,
    SETTLED_BY_PREPARATION,
    FeatureRequest,
    Manifest,
    check_same_request,
    json_sha256,
    read_receipt,
    target_description,
    weights_sha256,
    write_json,
    write_receipt,
)
from .feature_shards import Shard, check_shard, features_num_bytes, file_sha256, plan_shards, write_shard
from .placement import check_has_decoder, load_target
from .release import command_line, device_name, provenance
from .state_storage import STORAGE_DTYPES
from .stored_target import save_head
from .target import check_logits_can_be_chunked

logger = logging.getLogger(__name__)

USAGE = """prepare_features.py --model-path TARGET --dataset DATASET --output-dir DIRECTORY [options]
       prepare_features.py --help"""
INTERRUPTED = 130
OWN_FILES = (MANIFEST_NAME, HEAD_NAME)
# A process that is done waits for the others, which may have a damaged shard to write again.
PATIENCE = timedelta(days=7)


@dataclass
class FeatureArguments:
    """Which target to read, and how to store what it says."""

    model_path: str = field(metadata={"help": "The target: a local directory or a Hub id."})
    output_dir: str = field(metadata={"help": "Where the features go; an interrupted run is continued there."})
    storage_dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the states. auto: the target's, which loses nothing; int8 takes half of bfloat16.",
            "choices": ["auto", *STORAGE_DTYPES],
        },
    )
    tokens_per_shard: int = field(default=32768, metadata={"help": "Tokens of one file, and of one piece of work."})
    target_dtype: str = field(
        default="auto",
        metadata={
            "help": "auto: the checkpoint's on a GPU, float32 on a CPU. As in the training that is to follow.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    target_device_map: str | None = field(
        default=None, metadata={"help": "auto: spread the target over the devices that one process sees."}
    )
    seed: int = field(
        default=42, metadata={"help": "Of the choice of rows by `--dataset-weights`; as in the training to follow."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU even where there is a GPU."})

    def __post_init__(self):
        if self.tokens_per_shard < 1:
            raise ValueError(f"`--tokens-per-shard` must be at least 1, got {self.tokens_per_shard}.")


@dataclass(frozen=True)
class Preparation:
    """A checked request, everything loaded."""

    directory: Path
    rows: Dataset
    target: PreTrainedModel
    manifest: Manifest
    shards: list[Shard]
    state: PartialState


@dataclass(frozen=True)
class FeatureFacts:
    """
    What `provenance.json` says about stored features.

    Args:
        argv (`list[str]`): The command.
        request ([`FeatureRequest`]): Target, data and settings.
        num_tokens (`int`): Of all documents.
        num_tokens_of_last_run (`int`), seconds_of_last_run (`float`): What the first process of this run did.
        num_processes (`int`): Of this run.
        device (`str`): What it ran on.
    """

    argv: list[str]
    request: FeatureRequest
    num_tokens: int
    num_tokens_of_last_run: int
    seconds_of_last_run: float
    num_processes: int
    device: str


def main(argv: list[str] | None = None) -> None:
    """Stores features; a wrong request ends with one message and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    parser = HfArgumentParser((DataArguments, FeatureArguments), prog="prepare_features.py", usage=USAGE)
    try:
        data, settings = parser.parse_args_into_dataclasses(argv)
        preparation = prepare(data, settings, PartialState(cpu=settings.use_cpu, timeout=PATIENCE))
    except (ValueError, OSError, NotImplementedError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    try:
        write_features(preparation)
    except KeyboardInterrupt:
        done = [
            read_receipt(preparation.directory, shard, preparation.manifest.request) for shard in preparation.shards
        ]
        sys.stderr.write(
            f"Interrupted. {len(done) - done.count(None)} of {len(done)} shards in {preparation.directory} are "
            "complete; the same command continues with the others.\n"
        )
        sys.exit(INTERRUPTED)


def prepare(data: DataArguments, settings: FeatureArguments, state: PartialState) -> Preparation:
    """
    Checks the request in the order of what it costs, and loads what it names.

    Raises:
        ValueError: If something in it cannot work, or other features are in the directory.
    """
    check_arguments(data)
    directory = Path(settings.output_dir)
    check_writable(directory)
    target_config = load_target_config(settings.model_path)
    vocab_size = target_config.get_text_config(decoder=True).vocab_size
    tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    end_token_ids = end_of_turn_ids(tokenizer, load_generation_config(settings.model_path, target_config))
    with state.main_process_first():
        rows = prepare_rows(data, tokenizer, vocab_size, end_token_ids, settings.seed).rows
    dtype = expected_dtype(settings, target_config, state.device)
    asked = {
        "format_version": FORMAT_VERSION,
        "target_config_sha256": json_sha256(target_description(settings.model_path)),
        "target_dtype": dtype,
        "eagle_aux_hidden_state_layer_ids": Eagle3MLAConfig.from_target(
            target_config
        ).eagle_aux_hidden_state_layer_ids,
        "storage_dtype": dtype if settings.storage_dtype == "auto" else settings.storage_dtype,
        "max_length": data.max_length,
        "data_sha256": content_hash(rows),
        "num_documents": len(rows),
        "tokens_per_shard": settings.tokens_per_shard,
    }
    check_directory(directory, asked)
    shards = plan_shards(rows, settings.tokens_per_shard)
    if state.is_main_process:
        check_disk_space(directory, shards, target_config, asked)
    # Nobody writes before the space is measured.
    state.wait_for_everyone()
    target = load_target(
        DraftArguments(
            settings.model_path, target_dtype=settings.target_dtype, target_device_map=settings.target_device_map
        ),
        state.device,
    )
    check_has_decoder(target)
    check_logits_can_be_chunked(target)
    asked["target_weights_sha256"] = weights_sha256(target)
    check_directory(directory, asked)
    with state.main_process_first():
        manifest = begin(directory, FeatureRequest(**asked), data, settings, target)
    return Preparation(directory, rows, target, manifest, shards, state)


def check_arguments(data: DataArguments) -> None:
    """
    Refuses what is no matter of this command.

    Raises:
        ValueError: Names the first such argument.
    """
    if data.features is not None:
        raise ValueError("`--features` is for training. Give `--dataset`.")
    for entry in fields(data):
        is_known = entry.name in (*SETTLED_BY_PREPARATION, "preprocessing_workers")
        if not is_known and getattr(data, entry.name) != entry.default:
            raise ValueError(f"`--{entry.name.replace('_', '-')}` is for training. Leave it out.")


def expected_dtype(settings: FeatureArguments, target_config: PreTrainedConfig, device: torch.device) -> str:
    """In which `load_target` will load the target."""
    if settings.target_dtype != "auto":
        return settings.target_dtype
    configured = target_config.get_text_config(decoder=True).dtype or torch.float32
    return "float32" if device.type == "cpu" else str(configured).removeprefix("torch.")


def check_directory(directory: Path, asked: dict) -> None:
    """
    Requires that the directory is empty or belongs to this request.

    Raises:
        ValueError: If it does not.
    """
    if (directory / MANIFEST_NAME).is_file():
        check_same_request(directory, Manifest.read(directory).request, asked)
        return
    # A run that was killed at its very beginning leaves these.
    strangers = [path.name for path in directory.glob("*") if path.name.removeprefix(".incomplete-") not in OWN_FILES]
    if strangers:
        raise ValueError(f"`--output-dir` {directory} holds something else ({strangers[0]}). Give an empty directory.")


def check_disk_space(directory: Path, shards: list[Shard], target_config: PreTrainedConfig, asked: dict) -> None:
    """
    Compares what is still to be written with what is free.

    Raises:
        ValueError: If it does not fit.
    """
    text_config = target_config.get_text_config(decoder=True)
    storage_dtype = STORAGE_DTYPES[asked["storage_dtype"]]
    missing = [shard for shard in shards if not (directory / shard.name).is_file()]
    totals = [sum(getattr(shard, name) for shard in missing) for name in ("num_documents", "num_tokens", "num_taught")]
    needed = features_num_bytes(text_config.hidden_size, storage_dtype, *totals)
    num_matrices = 1 if target_config.tie_word_embeddings else 2
    if not (directory / HEAD_NAME).is_file():
        itemsize = getattr(torch, asked["target_dtype"]).itemsize
        needed += num_matrices * text_config.vocab_size * text_config.hidden_size * itemsize
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    logger.info(
        "%d of %d shards are to be written: %d documents, %d tokens, %.2f GB; %.2f GB are free.",
        *(len(missing), len(shards), *totals[:2], needed / 1e9, free / 1e9),
    )
    if needed > free:
        raise ValueError(
            f"`--output-dir` {directory} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there. Give "
            "another directory, less data, or a shorter `--storage-dtype`."
        )


def begin(
    directory: Path, request: FeatureRequest, data: DataArguments, settings: FeatureArguments, target: PreTrainedModel
) -> Manifest:
    """The manifest that is in the directory, or a new one; with it the target's head. **Effects**: writes both."""
    head = directory / HEAD_NAME
    if (directory / MANIFEST_NAME).is_file():
        manifest = Manifest.read(directory)
        if head.is_file() and file_sha256(head) == manifest.head_sha256:
            return manifest
        logger.warning("%s is missing or damaged; it is written again.", head)
        manifest = replace(manifest, head_sha256=save_head(target, head))
        manifest.write(directory)
        return manifest
    directory.mkdir(parents=True, exist_ok=True)
    eos_token_id = target.generation_config.eos_token_id
    manifest = Manifest(
        request=request,
        target=settings.model_path,
        data={name: getattr(data, name) for name in SETTLED_BY_PREPARATION},
        target_config=target_description(settings.model_path),
        eos_token_ids=eos_token_id if isinstance(eos_token_id, list) else [eos_token_id],
        hidden_size=target.config.get_text_config(decoder=True).hidden_size,
        head_sha256=save_head(target, head),
    )
    manifest.write(directory)
    return manifest


def write_features(preparation: Preparation) -> None:
    """Writes the shards that are not there; the last process to finish completes the manifest."""
    directory, manifest, state = preparation.directory, preparation.manifest, preparation.state
    start = time.perf_counter()
    own = preparation.shards[state.process_index :: state.num_processes]
    missing = [shard for shard in own if not is_complete(directory, shard, manifest)]
    num_tokens = sum(shard.num_tokens for shard in missing)
    progress = tqdm(
        total=num_tokens, desc="Storing features", unit="token", unit_scale=True, disable=not state.is_main_process
    )
    with progress:
        for shard in missing:
            documents = read_documents(preparation, shard, progress)
            checksum = write_shard(directory / shard.name, shard, manifest.shard_format, documents)
            write_receipt(directory, shard, manifest.request, checksum)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(preparation, num_tokens, time.perf_counter() - start)
    state.wait_for_everyone()


def is_complete(directory: Path, shard: Shard, manifest: Manifest) -> bool:
    """True if the shard is there as it was written; says so if it was damaged since."""
    checksum = recorded_checksum(directory, shard, manifest)
    if checksum is None:
        return False
    try:
        check_shard(directory / shard.name, shard, manifest.shard_format)
    except ValueError as error:
        logger.warning("%s It is written again.", str(error).split(". ")[0] + ".")
        return False
    if file_sha256(directory / shard.name) != checksum:
        logger.warning("The shard %s is damaged: its checksum differs. It is written again.", directory / shard.name)
        return False
    return True


def recorded_checksum(directory: Path, shard: Shard, manifest: Manifest) -> str | None:
    """The checksum of a shard that was completed, from its receipt or else from the manifest."""
    receipt = read_receipt(directory, shard, manifest.request)
    return manifest.checksums[shard.index] if receipt is None and manifest.complete else receipt


@torch.no_grad()
def read_documents(preparation: Preparation, shard: Shard, progress: tqdm) -> Iterator[dict[str, Tensor]]:
    """What the target says about every document of a shard."""
    target = preparation.target
    device = target.get_input_embeddings().weight.device
    layer_ids = preparation.manifest.request.eagle_aux_hidden_state_layer_ids
    captured = AuxHiddenStates(target, layer_ids, device, target.dtype)
    first = shard.first_document
    for row in preparation.rows.select(range(first, first + shard.num_documents)).with_format("torch"):
        input_ids, loss_mask = row["input_ids"].long(), row["loss_mask"]
        lesson = read_document(target, captured, input_ids.to(device))
        yield {
            "input_ids": input_ids,
            "loss_mask": loss_mask,
            "aux_hidden_states": lesson.aux_hidden_states[0],
            "last_hidden_states": lesson.last_hidden_states[0],
        }
        progress.update(len(input_ids))


def finish(preparation: Preparation, num_tokens: int, seconds: float) -> None:
    """Completes the manifest, and says where the features come from. **Effects**: removes the receipts."""
    directory, manifest, shards = preparation.directory, preparation.manifest, preparation.shards
    checksums = [recorded_checksum(directory, shard, manifest) for shard in shards]
    replace(manifest, complete=True, shards=shards, checksums=checksums).write(directory)
    shutil.rmtree(directory / RECEIPTS_DIRECTORY, ignore_errors=True)
    for leftover in directory.glob(".incomplete-*"):
        leftover.unlink()
    facts = FeatureFacts(
        argv=command_line(),
        request=manifest.request,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_tokens_of_last_run=num_tokens,
        seconds_of_last_run=seconds,
        num_processes=preparation.state.num_processes,
        device=device_name(preparation.state.device),
    )
    write_json(directory / "provenance.json", provenance(facts))
    num_bytes = sum((directory / shard.name).stat().st_size for shard in shards)
    logger.info(
        "%d documents, %d tokens and %.3f GB in %s: %.0f bytes per token.",
        *(manifest.request.num_documents, facts.num_tokens, num_bytes / 1e9, directory),
        num_bytes / facts.num_tokens,
    )
