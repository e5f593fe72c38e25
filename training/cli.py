"""The training command: arguments in, trained head out.

Everything that can be wrong with the request is checked in `prepare`, in the order of what it costs: arguments, output
directory, configurations, data, target. Only then does training begin.
"""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..configuration_eagle3_mla import Eagle3MLAConfig
from .arguments import DEFAULT_DRAFT_VOCAB_SIZE, DataArguments, DraftArguments, Eagle3TrainingArguments
from .data import PaddingCollator, check_chat_template, content_hash, load_conversations, tokenize_conversations
from .initialization import initialize_from_target
from .release import RunFacts, command_line, device_name, write_release
from .trainer import Eagle3Trainer, find_checkpoint
from .ttt import TTTDraftModel
from .vocabulary import choose_draft_vocabulary, count_supervised_tokens

logger = logging.getLogger(__name__)

USAGE = """train_eagle3.py --model-path TARGET --dataset DATASET --output-dir DIRECTORY [options]
       train_eagle3.py --help"""


@dataclass(frozen=True)
class Run:
    """A checked request, everything loaded."""

    data: DataArguments
    settings: DraftArguments
    trainer: Eagle3Trainer
    num_supervised_tokens: int
    checkpoint: str | None


def main(argv: list[str] | None = None) -> None:
    """Trains a draft head; a wrong request ends with one message and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    parser = HfArgumentParser(
        (DataArguments, DraftArguments, Eagle3TrainingArguments), prog="train_eagle3.py", usage=USAGE
    )
    try:
        run = prepare(*parser.parse_args_into_dataclasses(argv))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    train(run)


def prepare(data: DataArguments, settings: DraftArguments, args: Eagle3TrainingArguments) -> Run:
    """
    Checks the request and loads what it names.

    Raises:
        ValueError: If something in it cannot work.
    """
    check_writable(Path(args.output_dir))
    checkpoint = None
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    target_config = load_target_config(settings.model_path)
    config = draft_config(target_config, settings)
    args.set_default_learning_rate(config.hidden_size)
    if checkpoint is not None:
        check_same_draft(config, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    check_chat_template(tokenizer)
    with args.main_process_first(desc="data"):
        rows = tokenize_conversations(load_conversations(data.dataset, data.dataset_split), tokenizer, data.max_length)
    token_counts = count_supervised_tokens(rows, config.vocab_size)
    target = load_target(settings, args.device)
    set_seed(args.seed)
    draft = TTTDraftModel(config)
    draft.set_draft_vocabulary(
        choose_draft_vocabulary(token_counts, config.draft_vocab_size, end_of_turn_ids(tokenizer, target))
    )
    if checkpoint is not None:
        check_same_vocabulary(draft, checkpoint)
    initialized = initialize_from_target(draft, target)
    logger.info("Taken from the target: %s.", ", ".join(initialized) or "nothing")
    collator = PaddingCollator(tokenizer.pad_token_id or 0)
    trainer = Eagle3Trainer(draft, target, args, train_dataset=rows, data_collator=collator)
    return Run(data, settings, trainer, int(token_counts.sum()), checkpoint)


def train(run: Run) -> None:
    """Trains, and writes the result to the output directory."""
    trainer = run.trainer
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=run.checkpoint)
    seconds = time.perf_counter() - start
    if not trainer.is_world_process_zero():
        return
    facts = RunFacts(
        argv=command_line(),
        target=run.settings.model_path,
        dataset=run.data.dataset,
        dataset_split=run.data.dataset_split,
        data_sha256=content_hash(trainer.train_dataset),
        num_rows=len(trainer.train_dataset),
        num_supervised_tokens=run.num_supervised_tokens,
        num_steps=trainer.state.global_step,
        num_ttt_steps=trainer.args.num_ttt_steps,
        seconds=seconds,
        device=device_name(trainer.args.device),
    )
    output_dir = Path(trainer.args.output_dir)
    write_release(trainer.draft, output_dir, facts, trainer.state.log_history)
    logger.info("The draft head is in %s.", output_dir)


def check_writable(output_dir: Path) -> None:
    """
    Tries to write where the result will go, and leaves nothing behind.

    Raises:
        ValueError: If that is not possible.
    """
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"`--output-dir` {output_dir} is not writable ({error.strerror}: {existing}).") from None


def load_target_config(model_path: str) -> PreTrainedConfig:
    """Raises `ValueError` in one sentence where transformers explains itself in ten lines."""
    try:
        return AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The target {model_path} cannot be loaded: {reason}") from error


def draft_config(target_config: PreTrainedConfig, settings: DraftArguments) -> Eagle3MLAConfig:
    """The draft's configuration: the target's shape with what the user asked for."""
    overrides = {"attention_type": settings.attention_type, "attn_implementation": settings.attn_implementation}
    vocab_size = target_config.get_text_config(decoder=True).vocab_size
    overrides["draft_vocab_size"] = min(DEFAULT_DRAFT_VOCAB_SIZE, vocab_size)
    for name in ("draft_vocab_size", "mla_latent_dim", "mla_rope_dim"):
        if getattr(settings, name) is not None:
            overrides[name] = getattr(settings, name)
    return Eagle3MLAConfig.from_target(target_config, **overrides)


def check_same_draft(config: Eagle3MLAConfig, checkpoint: str) -> None:
    """
    Requires that the arguments describe the draft that is in the checkpoint.

    Raises:
        ValueError: Names the first field that differs.
    """
    saved = Eagle3MLAConfig.from_pretrained(checkpoint)
    for name in Eagle3MLAConfig.__annotations__:
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(
                f"`{name}` is {getattr(saved, name)} in {checkpoint} but {getattr(config, name)} by the arguments. "
                "Resume with the arguments of the interrupted run."
            )


def check_same_vocabulary(draft: TTTDraftModel, checkpoint: str) -> None:
    """
    Requires that the data gives the draft vocabulary that is in the checkpoint.

    Raises:
        ValueError: If it does not.
    """
    with safe_open(Path(checkpoint) / "model.safetensors", framework="pt") as weights:
        saved = weights.get_tensor("d2t")
    if not torch.equal(saved, draft.d2t):
        raise ValueError(
            f"The dataset gives another draft vocabulary than {checkpoint} has. "
            "Resume with the data of the interrupted run."
        )


def load_target(settings: DraftArguments, device: torch.device) -> PreTrainedModel:
    """The target in evaluation mode on `device`; half precision is slow on a CPU, so float32 is the default there."""
    dtype = settings.target_dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    target = AutoModelForCausalLM.from_pretrained(settings.model_path, dtype=dtype)
    return target.requires_grad_(False).to(device).eval()


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel) -> list[int]:
    """Tokens that end generation, by the tokenizer and by the target's generation config."""
    ids = [tokenizer.eos_token_id]
    configured = target.generation_config.eos_token_id
    ids += configured if isinstance(configured, list) else [configured]
    return [token for token in ids if token is not None]
