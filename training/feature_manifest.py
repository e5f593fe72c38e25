"""What a directory of stored features says about itself: for which request it was made, and what it holds.

`manifest.json` is there before the first shard, with `"complete": false`, and gets the list of shards when all are
written. Until then every finished shard has a receipt in `receipts/`. All of these files are written under another
name and renamed; none holds a time or a place, so that the same request gives the same bytes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .feature_shards import Shard, ShardFormat
from .files import rename_flushed
from .state_storage import STORAGE_DTYPES

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
HEAD_NAME = "target_head.safetensors"
RECEIPTS_DIRECTORY = "receipts"
# What transformers writes into a config besides the model's own description.
VOLATILE_CONFIG_KEYS = ("transformers_version", "_name_or_path", "_commit_hash")
# Fields of `DataArguments` that decide what a document is, not how documents are put into batches.
SETTLED_BY_PREPARATION = (
    "dataset",
    "dataset_weights",
    "dataset_split",
    "dataset_config",
    "streaming",
    "max_rows",
    "max_length",
    "train_on_last_turn_only",
    "skip_bad_rows",
)


@dataclass(frozen=True)
class FeatureRequest:
    """
    All that the stored bytes depend on, but for the machine that computes them.

    Args:
        format_version (`int`): Of the files.
        target_config_sha256 (`str`), target_weights_sha256 (`str`): Identity of the target.
        target_dtype (`str`): In which it is run.
        eagle_aux_hidden_state_layer_ids (`list[int]`): Where its auxiliary states are read.
        storage_dtype (`str`): Of the stored states.
        max_length (`int`): Where documents were cut.
        data_sha256 (`str`): Of tokens and masks in their order.
        num_documents (`int`): Of the data.
        tokens_per_shard (`int`): See `plan_shards`.
    """

    format_version: int
    target_config_sha256: str
    target_weights_sha256: str
    target_dtype: str
    eagle_aux_hidden_state_layer_ids: list[int]
    storage_dtype: str
    max_length: int
    data_sha256: str
    num_documents: int
    tokens_per_shard: int

    @property
    def sha256(self) -> str:
        return json_sha256(asdict(self))


@dataclass(frozen=True)
class Manifest:
    """
    The content of `manifest.json`.

    Args:
        request ([`FeatureRequest`]): What the features were made for.
        target (`str`): As it was named in the command.
        data (`dict`): The arguments in `SETTLED_BY_PREPARATION`, likewise.
        target_config (`dict`): The target's `config.json`.
        eos_token_ids (`list[int]`): By the target's generation config.
        hidden_size (`int`): Of the target.
        head_sha256 (`str`): Checksum of `target_head.safetensors`.
        complete (`bool`): Whether all shards are written.
        shards (`list[Shard]`), checksums (`list[str]`): All of them, once they are; nothing before.
    """

    request: FeatureRequest
    target: str
    data: dict
    target_config: dict
    eos_token_ids: list[int]
    hidden_size: int
    head_sha256: str
    complete: bool = False
    shards: list[Shard] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)

    @property
    def shard_format(self) -> ShardFormat:
        storage_dtype = STORAGE_DTYPES[self.request.storage_dtype]
        return ShardFormat(self.hidden_size, storage_dtype, self.request.sha256)

    @property
    def target_dtype(self) -> torch.dtype:
        return getattr(torch, self.request.target_dtype)

    def write(self, directory: Path) -> None:
        content = asdict(self)
        checksums = content.pop("checksums")
        content["shards"] = [shard | {"sha256": sha} for shard, sha in zip(content["shards"], checksums, strict=True)]
        write_json(directory / MANIFEST_NAME, content)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """
        Raises:
            ValueError: If there is none, or it is of another format.
        """
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(f"{directory} holds no stored features: there is no {MANIFEST_NAME} in it.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from None
        version = content["request"]["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"`format_version` in {path} must be {FORMAT_VERSION}, got {version}.")
        try:
            content["request"] = FeatureRequest(**content["request"])
            content["checksums"] = [shard.pop("sha256") for shard in content["shards"]]
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            manifest = cls(**content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}. Prepare the features again.") from error
        manifest.check_shards(path)
        return manifest

    def check_shards(self, path: Path) -> None:
        """
        Requires that the shards hold all documents, in order.

        Raises:
            ValueError: If they do not.
        """
        next_document = 0
        for shard in self.shards:
            if shard.first_document != next_document:
                raise ValueError(f"{path} is damaged: {shard.name} must begin with document {next_document}.")
            next_document += shard.num_documents
        if self.complete and next_document != self.request.num_documents:
            num_documents = self.request.num_documents
            raise ValueError(
                f"{path} is damaged: its shards must hold {num_documents} documents, got {next_document}."
            )


def check_same_request(directory: Path, saved: FeatureRequest, asked: dict) -> None:
    """
    Requires that the features in a directory are those that are asked for.

    Args:
        directory (`Path`): Where they are.
        saved ([`FeatureRequest`]): What they were made for.
        asked (`dict`): Fields of a [`FeatureRequest`], or some of them.

    Raises:
        ValueError: Names the first field that differs.
    """
    for name, value in asked.items():
        if getattr(saved, name) != value:
            raise ValueError(
                f"`{name}` is {getattr(saved, name)} for the features in {directory} but {value} by this request. "
                "Give the arguments of the features that are there, or another directory."
            )


def write_receipt(directory: Path, shard: Shard, request: FeatureRequest, checksum: str) -> None:
    """Says that a shard is complete."""
    receipts = directory / RECEIPTS_DIRECTORY
    receipts.mkdir(exist_ok=True)
    content = {"shard": shard.name, "request_sha256": request.sha256, "sha256": checksum}
    write_json(receipts / f"{shard.name}.json", content)


def read_receipt(directory: Path, shard: Shard, request: FeatureRequest) -> str | None:
    """The checksum of a shard that was completed for this request, or `None`."""
    path = directory / RECEIPTS_DIRECTORY / f"{shard.name}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["sha256"] if content["request_sha256"] == request.sha256 else None


def write_json(path: Path, content: dict) -> None:
    """Writes under another name, flushes to the disk and renames."""
    incomplete = path.with_name(f".incomplete-{path.name}")
    incomplete.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    rename_flushed(incomplete, path)


def json_sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def target_description(model_path: str) -> dict:
    """The target's `config.json` without what differs between two saves of one model."""
    content, _ = PreTrainedConfig.get_config_dict(model_path)
    return {name: value for name, value in content.items() if name not in VOLATILE_CONFIG_KEYS}


def check_same_target(manifest: Manifest, model_path: str) -> None:
    """
    Requires that `model_path` has the configuration of the features' target; its weights are not looked at.

    Raises:
        ValueError: Names the first key that differs.
    """
    saved, asked = manifest.target_config, target_description(model_path)
    for key in sorted(saved.keys() | asked.keys()):
        if saved.get(key) != asked.get(key):
            raise ValueError(
                f"The features are of another target: its `{key}` is {saved.get(key)}, that of {model_path} is "
                f"{asked.get(key)}. Give the target that the features were prepared with ({manifest.target})."
            )


def weights_sha256(target: PreTrainedModel) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the target's weights; tied ones count once."""
    digest = hashlib.sha256()
    for name, weight in sorted(target.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
