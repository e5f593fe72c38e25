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
from rich.console import Console
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..configuration_eagle3_mla import Eagle3MLAConfig
from .adapters import add_adapter, check_same_adapter, check_same_kind, require_peft
from .arguments import DataArguments, DraftArguments, Eagle3TrainingArguments
from .averaging import check_has_average
from .batching import PaddingCollator
from .continuation import load_trained_draft, trained_config
from .data import PreparedRows, content_hash, end_of_turn_ids, load_generation_config, prepare_rows
from .diagnosis import report_diagnosis
from .diagnosis_case import Case, trained_length
from .feature_collator import FeatureCollator
from .feature_training import choose_teacher, features_of_run, load_stored_target
from .files import intact_weights
from .hub import Destination, claim_destination, open_destination, push_result
from .initialization import initialize_from_target
from .inspection import print_inspection
from .optimization import check_has_matrices, check_same_optimizer
from .packing import pack_rows
from .placement import check_has_decoder, check_placement, claim_devices, load_target, try_packing_together
from .plots import CurvesCallback
from .release import (
    RunFacts,
    all_arguments,
    code_facts,
    command_line,
    device_name,
    first_not_finite,
    hardware_facts,
    write_release,
)
from .stored_target import StoredTarget
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
    prepared: PreparedRows
    num_supervised_tokens: int
    checkpoint: str | None
    tokenizer: PreTrainedTokenizerBase
    destination: Destination | None


def main(argv: list[str] | None = None) -> int:
    """
    Trains a draft head, or diagnoses one; a wrong request ends with one message and exit code 2.

    Returns:
        `int`: The exit code: 1 if a check of the diagnosis failed, the trained weights are not finite, or the result
            could not be pushed.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    parser = HfArgumentParser(
        (DataArguments, DraftArguments, Eagle3TrainingArguments), prog="train_eagle3.py", usage=USAGE
    )
    try:
        data, settings, args = parser.parse_args_into_dataclasses(argv)
        if data.inspect_data is not None:
            return inspect_data(data, settings, args)
        run = prepare(data, settings, args)
        if run.destination is not None:
            open_destination(run.destination)
    except (ValueError, NotImplementedError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return diagnose(run) if run.trainer.args.diagnose else train(run)


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
    check_placement(settings)
    claim_devices(settings, args)
    if settings.lora_rank is not None:
        require_peft()
    target_config = load_target_config(settings.model_path)
    fresh = settings.draft_checkpoint is None
    config = draft_config(target_config, settings) if fresh else trained_config(settings)
    args.set_default_rates(config.hidden_size, is_adapter=settings.lora_rank is not None)
    if checkpoint is not None:
        check_resumes(settings, args, config, checkpoint)
    destination = claim_destination(args)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    if data.features is not None:
        prepared = PreparedRows(features_of_run(data, settings, args, config), sources=[])
    else:
        end_ids = end_of_turn_ids(tokenizer, load_generation_config(settings.model_path, target_config))
        with args.main_process_first(desc="data"):
            prepared = prepare_rows(data, tokenizer, config.vocab_size, end_ids, args.seed)
    rows = prepared.rows
    packed = pack_rows(rows, data.max_length, args.seed) if data.packing else rows
    check_makes_a_step(args, len(packed))
    token_counts = count_supervised_tokens(rows, config.vocab_size)
    is_stored = data.features is not None
    if is_stored:
        target = load_stored_target(rows, target_config, args.device)
    else:
        target = load_target(settings, args.device)
        check_has_decoder(target)
    set_seed(args.seed)
    if fresh:
        draft_ids = choose_draft_vocabulary(
            token_counts, config.draft_vocab_size, end_of_turn_ids(tokenizer, target.generation_config)
        )
        draft = fresh_draft(config, draft_ids, target, checkpoint)
    else:
        draft = load_trained_draft(settings)
    teacher = choose_teacher(target, draft, settings, max(rows["length"]))
    if settings.shard_target and data.features is None:
        try_packing_together(teacher)
    model = trained_model(draft, settings, args, checkpoint)
    collator = PaddingCollator(tokenizer.pad_token_id or 0, data.pad_to_multiple_of)
    collator = FeatureCollator(collator) if is_stored else collator
    callbacks = [CurvesCallback()]
    trainer = Eagle3Trainer(model, teacher, args, train_dataset=packed, data_collator=collator, callbacks=callbacks)
    return Run(data, settings, trainer, prepared, int(token_counts.sum()), checkpoint, tokenizer, destination)


def check_makes_a_step(args: Eagle3TrainingArguments, num_rows: int) -> None:
    """
    Raises:
        ValueError: If all rows would be left out, since they do not make one batch.
    """
    if args.dataloader_drop_last and not args.diagnose and num_rows < args.global_batch_size:
        raise ValueError(
            f"`--dataloader-drop-last` leaves no step: a step takes {args.global_batch_size} rows, and there are "
            f"{num_rows}. Leave it out, or lower `--per-device-train-batch-size`."
        )


def fresh_draft(
    config: Eagle3MLAConfig, draft_ids: Tensor, target: PreTrainedModel | StoredTarget, checkpoint: str | None
) -> TTTDraftModel:
    """
    A draft at its starting point.

    Args:
        config ([`Eagle3MLAConfig`]): What it looks like.
        draft_ids (`torch.Tensor`): The tokens that it can predict.
        target (`PreTrainedModel` or [`StoredTarget`]): What it takes weights from.
        checkpoint (`str`, *optional*): The one to resume from.

    Raises:
        ValueError: If the draft in `checkpoint` predicts other tokens.
    """
    draft = TTTDraftModel(config)
    draft.set_draft_vocabulary(draft_ids)
    if checkpoint is not None:
        check_same_vocabulary(draft, checkpoint)
    initialized = initialize_from_target(draft, target)
    logger.info("Taken from the target: %s.", ", ".join(initialized) or "nothing")
    return draft


def trained_model(
    draft: TTTDraftModel, settings: DraftArguments, args: Eagle3TrainingArguments, checkpoint: str | None
) -> PreTrainedModel:
    """
    What the Trainer gets: the draft, or the draft in an adapter.

    Raises:
        ValueError: If the adapter in `checkpoint` is another one, or Muon would have nothing to train.
    """
    model = draft if settings.lora_rank is None else add_adapter(draft, settings)
    if args.muon_learning_rate:
        check_has_matrices(model, args.muon_learning_rate)
    if checkpoint is not None and settings.lora_rank is not None:
        check_same_adapter(model, Path(checkpoint))
    return model


def inspect_data(data: DataArguments, settings: DraftArguments, args: Eagle3TrainingArguments) -> int:
    """
    Prints what would be learnt from, without the target's weights; the exit code is 0.

    Raises:
        ValueError: If the data cannot be used.
    """
    target_config = load_target_config(settings.model_path)
    fresh = settings.draft_checkpoint is None
    config = draft_config(target_config, settings) if fresh else trained_config(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    end_ids = end_of_turn_ids(tokenizer, load_generation_config(settings.model_path, target_config))
    prepared = prepare_rows(data, tokenizer, config.vocab_size, end_ids, args.seed)
    counts = count_supervised_tokens(prepared.rows, config.vocab_size)
    if fresh:
        draft_ids = choose_draft_vocabulary(counts, config.draft_vocab_size, end_ids)
    else:
        draft_ids = load_trained_draft(settings).t2d.nonzero().squeeze(1)
    print_inspection(Console(), prepared, tokenizer, counts, draft_ids, data.inspect_data)
    if data.packing:
        pack_rows(prepared.rows, data.max_length, args.seed)
    return 0


def diagnose(run: Run) -> int:
    """Says why the acceptance is low; the exit code is 0 if no check failed."""
    trainer, source = run.trainer, run.settings.draft_checkpoint
    case = Case(
        draft=trainer.draft,
        target=trainer.teacher.target,
        teacher=trainer.teacher,
        tokenizer=run.tokenizer,
        rows=run.prepared.rows,
        collator=PaddingCollator(run.tokenizer.pad_token_id or 0),
        args=trainer.args,
        max_length=run.data.max_length,
        end_ids=end_of_turn_ids(run.tokenizer, trainer.teacher.target.generation_config),
        is_trained=source is not None,
        trained_length=None if source is None else trained_length(source),
        num_dropped_rows=run.prepared.num_dropped,
    )
    origin = {"argv": command_line()} | code_facts()
    return report_diagnosis(case, Path(trainer.args.output_dir), origin)


def train(run: Run) -> int:
    """
    Trains, and writes the result to the output directory.

    Returns:
        `int`: The exit code: 1 if the weights are not finite and so are not written, or the result is not pushed.
    """
    trainer = run.trainer
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=run.checkpoint)
    seconds = time.perf_counter() - start
    weights = trainer.released_weights()  # by all processes
    if not trainer.is_world_process_zero():
        return 0
    broken = first_not_finite(weights)
    if broken is not None:
        logger.error(
            "`%s` holds a number that is not finite: no result is written, the checkpoints in %s stay. Lower "
            "`--learning-rate`, or look at the data with `--diagnose True`.",
            broken,
            trainer.args.output_dir,
        )
        return 1
    facts = RunFacts(
        argv=command_line(),
        target=run.settings.model_path,
        dataset=run.data.dataset_name,
        dataset_split=run.data.split_name,
        data_sha256=content_hash(run.prepared.rows),
        num_rows=len(run.prepared.rows),
        num_supervised_tokens=run.num_supervised_tokens,
        num_steps=trainer.state.global_step,
        num_ttt_steps=trainer.args.num_ttt_steps,
        seconds=seconds,
        device=device_name(trainer.args.device),
        longest_row=max(run.prepared.rows["length"]),
        hardware=hardware_facts(trainer.args.device, trainer.args.world_size),
        arguments=all_arguments(run.data, run.settings, trainer.args),
        repo_id=None if run.destination is None else run.destination.repo_id,
    )
    output_dir = Path(trainer.args.output_dir)
    names = write_release(trainer.model, output_dir, facts, trainer.state.log_history, weights)
    logger.info("The draft head is in %s.", output_dir)
    return 0 if run.destination is None or push_result(output_dir, names, run.destination) else 1


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
        where = "" if Path(model_path).is_dir() else "there is no such folder here, and as a Hub repository: "
        raise ValueError(f"The target {model_path} cannot be loaded: {where}{reason}") from error


def draft_config(target_config: PreTrainedConfig, settings: DraftArguments) -> Eagle3MLAConfig:
    """The draft's configuration: the target's shape with what the user asked for."""
    overrides = {"attention_type": settings.attention_type, "attn_implementation": settings.attn_implementation}
    vocab_size = target_config.get_text_config(decoder=True).vocab_size
    overrides["draft_vocab_size"] = settings.num_draft_tokens(vocab_size)
    for name in ("mla_latent_dim", "mla_rope_dim", "embed_residual", "fc_norm", "norm_output"):
        if getattr(settings, name) is not None:
            overrides[name] = getattr(settings, name)
    return Eagle3MLAConfig.from_target(target_config, **overrides)


def check_resumes(
    settings: DraftArguments, args: Eagle3TrainingArguments, config: Eagle3MLAConfig, checkpoint: str
) -> None:
    """
    Requires that the arguments are those of the run that wrote the checkpoint, as far as its files tell.

    Raises:
        ValueError: Names what differs.
    """
    check_same_kind(settings, Path(checkpoint))
    check_same_optimizer(bool(args.muon_learning_rate), Path(checkpoint))
    if args.ema_decay is not None:
        check_has_average(Path(checkpoint), args.ema_decay)
    if settings.lora_rank is None:
        check_same_draft(config, checkpoint)


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
    file = Path(checkpoint) / "model.safetensors"
    with intact_weights(checkpoint), safe_open(file, framework="pt") as weights:
        saved = weights.get_tensor("d2t")
    if not torch.equal(saved, draft.d2t):
        raise ValueError(
            f"The dataset gives another draft vocabulary than {checkpoint} has. "
            "Resume with the data of the interrupted run."
        )
