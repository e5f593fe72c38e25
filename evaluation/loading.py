"""Opens target and draft for the command lines, with errors that name the flag."""

import argparse
import logging
import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration_eagle3_mla import Eagle3MLAConfig
from ..training.arguments import ATTENTION_BACKENDS

logger = logging.getLogger(__name__)

DEFAULT_BACKENDS = {"mla": "sdpa_mla", "gqa": "sdpa"}
DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft-checkpoint", required=True, help="folder or Hub repository of the draft head")
    parser.add_argument("--target-model-path", required=True, help="folder or Hub repository of the target")
    parser.add_argument(
        "--attention-backend",
        choices=ATTENTION_BACKENDS,
        help="kernel of the draft (default: SDPA, of the checkpoint's attention type)",
    )
    parser.add_argument("--num-assistant-tokens", type=positive_int, help="drafted per round (default: the draft's)")
    parser.add_argument("--tree-top-k", type=positive_int, help="branches of a tree, 1: chains (default: the draft's)")
    parser.add_argument("--tree-depth", type=positive_int, help="depth of a tree (default: the draft's)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, help="(default: %(default)s)")
    parser.add_argument("--do-sample", action="store_true", help="sample; the default is greedy")
    parser.add_argument("--temperature", type=positive_float, default=1.0, help="when sampling (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both models (default: %(default)s)")
    parser.add_argument("--device", type=available_device, default=None, help="(default: the GPU if there is one)")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def available_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be a device such as cpu or cuda:0, got {text}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"must be one of the {torch.cuda.device_count()} GPUs here, got {text}")
    return device


def load_models(
    arguments: argparse.Namespace,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Target, draft and tokenizer as `add_model_arguments` describes them, checked against each other.

    Raises:
        ValueError: If one is missing, or they do not belong together.
    """
    device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draft_config = read_config("--draft-checkpoint", arguments.draft_checkpoint)
    read_config("--target-model-path", arguments.target_model_path)
    kernel = choose_kernel(draft_config, arguments.draft_checkpoint, arguments.attention_backend)
    kernel = quick_kernel(kernel, device)
    dtype = getattr(torch, arguments.dtype)
    draft = AutoModel.from_pretrained(
        arguments.draft_checkpoint, trust_remote_code=True, attn_implementation=kernel, dtype=dtype
    ).to(device)
    target = AutoModelForCausalLM.from_pretrained(arguments.target_model_path, dtype=dtype).to(device)
    draft.check_target(target)
    sizes = {
        "num_assistant_tokens": arguments.num_assistant_tokens,
        "assistant_tree_top_k": arguments.tree_top_k,
        "assistant_tree_depth": arguments.tree_depth,
    }
    for name, value in sizes.items():
        if value is not None:
            setattr(draft.generation_config, name, value)
    return target.eval(), draft.eval(), AutoTokenizer.from_pretrained(arguments.target_model_path)


def read_config(flag: str, path: str) -> PreTrainedConfig:
    """The configuration at `path`, a folder or a Hub repository.

    Raises:
        ValueError: If there is none; the message names `flag`.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise ValueError(f"`{flag}` must be an existing folder or a Hub repository (owner/name), got {path}.")
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise ValueError(f"`{flag}` must hold a config.json, got {path}, which has none.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=flag == "--draft-checkpoint")
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        where = "" if Path(path).is_dir() else f"there is no folder {path} here, and as a Hub repository: "
        raise ValueError(f"`{flag}` cannot be read: {where}{reason}") from error


def choose_kernel(draft_config: PreTrainedConfig, path: str, backend: str | None) -> str:
    """The `attn_implementation` of `--attention-backend`.

    Raises:
        ValueError: If `path` holds no draft head, or one of the other attention type.
    """
    if draft_config.model_type != Eagle3MLAConfig.model_type:
        raise ValueError(
            f"`--draft-checkpoint` must hold a model of type {Eagle3MLAConfig.model_type}, got {path} of type "
            f"{draft_config.model_type}."
        )
    usable = DEFAULT_BACKENDS[draft_config.attention_type]
    attention_type, kernel = ATTENTION_BACKENDS[backend or usable]
    if attention_type != draft_config.attention_type:
        raise ValueError(
            f'`--attention-backend {backend}` is for `attention_type="{attention_type}"`, the checkpoint {path} has '
            f'"{draft_config.attention_type}". Use `--attention-backend {usable}`, or convert the checkpoint.'
        )
    return kernel


def quick_kernel(kernel: str, device: torch.device) -> str:
    """The kernel; SDPA for FlexAttention on a CPU, where it is not fused: twice the seconds of a whole call."""
    if kernel != "flex_attention" or device.type != "cpu":
        return kernel
    logger.warning("FlexAttention is slow on the CPU; the sdpa backend of the same attention takes its place.")
    return "sdpa"


def check_writable(folder: Path) -> None:
    """Finds out before the work, and without writing, whether `folder` can be made and written to.

    Raises:
        ValueError: If not.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"`--output-dir` must be a folder that can be written to, got {folder}.")
