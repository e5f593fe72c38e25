"""The regeneration command: a dataset and a target in, the dataset with the target's answers out.

Everything that can be wrong with the request is checked in `prepare`, in the order of what it costs: arguments, output
directory, data, target. A wrong request ends with one message and exit code 2.
"""

import hashlib
import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from .answered_rows import FILE_FORMATS, OUTPUT_FORMATS, row_form
from .answering import Decoding, TargetAnswerer
from .arguments import DraftArguments
from .cli import check_writable, load_target_config
from .data import end_of_turn_ids
from .endpoint import Endpoint, EndpointAnswerer, EndpointError
from .feature_manifest import weights_sha256
from .placement import load_target
from .prompt_rows import survey_rows
from .regeneration import Regeneration, regenerate, total_record
from .release import command_line, device_name, provenance
from .row_shards import RowShards
from .sources import load_conversations

logger = logging.getLogger(__name__)

USAGE = """regenerate_dataset.py --model-path TARGET --dataset DATASET --output-dir DIRECTORY [options]
       regenerate_dataset.py --endpoint URL --endpoint-model NAME --dataset DATASET --output-dir DIRECTORY [options]
       regenerate_dataset.py --help"""
INTERRUPTED = 130


@dataclass(frozen=True)
class RegenerationFacts:
    """
    What `provenance.json` says about a result.

    Args:
        argv (`list[str]`): The command.
        target (`str`), dataset (`str`), dataset_split (`str`): As they were named in it.
        data_sha256 (`str`): Of the rows that were asked.
        seconds (`float`): Wall-clock time of the process that found the last shard complete.
        device (`str`): What it ran on, or the endpoint.
        num_processes (`int`): How many shared the work.
        result (`dict`): Sum of the shards' records.
    """

    argv: list[str]
    target: str
    dataset: str
    dataset_split: str
    data_sha256: str
    seconds: float
    device: str
    num_processes: int
    result: dict


@dataclass
class RegenerationArguments:
    """What to ask, whom, and how."""

    dataset: str = field(metadata={"help": "JSONL or Parquet file, directory, or Hub id of conversations."})
    output_dir: str = field(metadata={"help": "Where the new dataset goes; training takes it as `--dataset`."})
    model_path: str | None = field(default=None, metadata={"help": "The target: a local directory or a Hub id."})
    endpoint: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible server in the place of a target here, up to /v1."}
    )
    endpoint_model: str | None = field(default=None, metadata={"help": "Name of the target on the server."})
    api_key_env: str | None = field(default=None, metadata={"help": "Environment variable that holds the API key."})
    concurrency: int = field(default=16, metadata={"help": "Conversations that the endpoint is asked at once."})
    request_timeout: float = field(default=600.0, metadata={"help": "Seconds that one request may take."})
    max_retries: int = field(default=8, metadata={"help": "Attempts after a failure that may pass."})

    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset or a saved DatasetDict."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Read no more than the first `--max-rows` rows of a Hub dataset."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Only the first rows. Default: all."})
    last_turn_only: bool = field(
        default=False, metadata={"help": "Answer the last turn only and keep the earlier ones as they are."}
    )

    max_new_tokens: int = field(default=1024, metadata={"help": "Longer answers are cut."})
    drop_cut_answers: bool | None = field(
        default=None,
        metadata={
            "help": "Leave cut answers out; otherwise their `finish_reason` is `length`. Default: True for messages, "
            "whose template puts an end behind them; False for tokens.",
            "nargs": "?",
            "const": True,
        },
    )
    do_sample: bool = field(default=False, metadata={"help": "Sample; the default is greedy."})
    temperature: float | None = field(default=None, metadata={"help": "Default: the target's own, otherwise 1."})
    top_p: float | None = field(default=None, metadata={"help": "Default: the target's own, otherwise 1."})
    top_k: int | None = field(default=None, metadata={"help": "Default: the target's own, otherwise all tokens."})
    seed: int = field(default=0, metadata={"help": "Of the samples; each answer has draws of its own."})

    batch_size: int = field(default=16, metadata={"help": "Prompts that the target answers at once."})
    target_dtype: str = field(
        default="auto",
        metadata={
            "help": "auto: the checkpoint's on a GPU, float32 on a CPU.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    target_device_map: str | None = field(
        default=None, metadata={"help": "auto: spread one copy of the target over all GPUs of this machine."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even where there is a GPU."})

    output_format: str = field(
        default="messages",
        metadata={
            "help": "messages: text. tokens: exactly what the target saw and said, with a mask.",
            "choices": list(OUTPUT_FORMATS),
        },
    )
    file_format: str = field(default="jsonl", metadata={"help": "Of the shards.", "choices": list(FILE_FORMATS)})
    rows_per_shard: int = field(default=512, metadata={"help": "Conversations of a shard; a shard is never redone."})

    def __post_init__(self):
        self._check_numbers()
        self._check_whom_to_ask()
        if self.drop_cut_answers is None:
            self.drop_cut_answers = self.output_format == "messages"

    def _check_numbers(self) -> None:
        for name in ("concurrency", "max_new_tokens", "batch_size", "rows_per_shard", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{flag(name)}` must be at least 1, got {value}.")
        for name in ("max_retries", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{flag(name)}` must be at least 0, got {value}.")
        for name in ("temperature", "request_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{flag(name)}` must be above 0, got {value}.")
        if self.streaming and self.max_rows is None:
            raise ValueError("`--streaming` needs `--max-rows`: how much of the dataset is read.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`--top-p` must be above 0 and at most 1, got {self.top_p}.")
        ignored = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if ignored and not self.do_sample:
            raise ValueError(f"`{flag(ignored[0])}` needs `--do-sample`; without it the answers are greedy.")

    def _check_whom_to_ask(self) -> None:
        if (self.model_path is None) == (self.endpoint is None):
            raise ValueError("Give either `--model-path` or `--endpoint`: one target answers.")
        if self.endpoint is None and (self.endpoint_model is not None or self.api_key_env is not None):
            raise ValueError("`--endpoint-model` and `--api-key-env` need `--endpoint`.")
        if self.endpoint is not None and self.endpoint_model is None:
            raise ValueError("`--endpoint` needs `--endpoint-model`, the name of the target on the server.")
        if self.endpoint is not None and self.output_format == "tokens":
            raise ValueError("`--output-format tokens` needs `--model-path`: an endpoint sends text only.")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ValueError(f"`--api-key-env` names the environment variable {self.api_key_env}, which is not set.")

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.max_new_tokens, self.do_sample, self.temperature, self.top_p, self.top_k, self.seed)


# What determines the rows, besides the data and the target; batch size, concurrency and the like may change between
# two parts of a run.
REQUEST_ARGUMENTS = (
    "endpoint_model",
    "max_rows",
    "last_turn_only",
    "max_new_tokens",
    "drop_cut_answers",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "output_format",
    "file_format",
    "rows_per_shard",
)


def main(argv: list[str] | None = None) -> None:
    """Regenerates a dataset; a wrong request ends with one message and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = HfArgumentParser(RegenerationArguments, prog="regenerate_dataset.py", usage=USAGE)
    try:
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        state = PartialState(cpu=arguments.use_cpu)
        logging.getLogger(__package__).setLevel(logging.INFO if state.is_main_process else logging.WARNING)
        job = prepare(arguments, state)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run(job, arguments, state)


def run(job: Regeneration, arguments: RegenerationArguments, state: PartialState) -> None:
    """Answers everything; an end before the end says what is there and how to go on."""
    start = time.perf_counter()
    try:
        regenerate(job)
    except KeyboardInterrupt:
        stop(INTERRUPTED, "Interrupted", job)
    except torch.OutOfMemoryError:
        stop(1, f"Out of memory with `--batch-size {arguments.batch_size}`, which may be smaller next time", job)
    except EndpointError as error:
        stop(1, str(error).removesuffix("."), job)
    report(job, arguments, state, time.perf_counter() - start)
    state.destroy_process_group()


def stop(code: int, reason: str, job: Regeneration) -> None:
    """Ends the process with one line."""
    shards = job.shards
    sys.stderr.write(
        f"\n{reason}. {shards.num_complete()} of {shards.num_shards} shards are complete in {shards.path}; "
        "the same command goes on from there.\n"
    )
    sys.exit(code)


def prepare(arguments: RegenerationArguments, state: PartialState) -> Regeneration:
    """
    Checks the request and loads what it names.

    Raises:
        ValueError: If something in it cannot work.
    """
    output_dir = Path(arguments.output_dir)
    check_writable(output_dir)
    endpoint = None if arguments.endpoint is None else endpoint_of(arguments)
    if arguments.model_path is not None:
        load_target_config(arguments.model_path)
    with state.main_process_first():
        rows = load_conversations(
            arguments.dataset,
            arguments.dataset_split,
            arguments.dataset_config,
            arguments.streaming,
            arguments.max_rows,
        )
    survey = survey_rows(rows)
    form = row_form(arguments.output_format, arguments.file_format, survey, is_endpoint=endpoint is not None)
    schema = form.schema(rows) if arguments.file_format == "parquet" else None
    request = {flag(name): getattr(arguments, name) for name in REQUEST_ARGUMENTS}
    request["rows of --dataset"] = survey.sha256
    num_shards = math.ceil(len(rows) / arguments.rows_per_shard)
    shards = RowShards(output_dir, num_shards, arguments.file_format, schema)
    if endpoint is not None:
        answerer = EndpointAnswerer(endpoint, arguments.decoding, arguments.drop_cut_answers)
    else:
        answerer, identity = load_answerer(arguments, state.device)
        request |= identity
    shards.begin(request, state.process_index)
    shards.check_complete_shards()
    return Regeneration(
        rows,
        answerer,
        shards,
        arguments.rows_per_shard,
        form,
        arguments.last_turn_only,
        state.process_index,
        state.num_processes,
    )


def endpoint_of(arguments: RegenerationArguments) -> Endpoint:
    return Endpoint(
        arguments.endpoint,
        arguments.endpoint_model,
        os.environ[arguments.api_key_env] if arguments.api_key_env is not None else None,
        arguments.concurrency,
        arguments.request_timeout,
        arguments.max_retries,
    )


def load_answerer(arguments: RegenerationArguments, device: torch.device) -> tuple[TargetAnswerer, dict[str, str]]:
    """The target, ready to answer, and what identifies it."""
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
    target = load_target(
        DraftArguments(
            model_path=arguments.model_path,
            target_dtype=arguments.target_dtype,
            target_device_map=arguments.target_device_map,
        ),
        device,
    )
    answerer = TargetAnswerer(
        target,
        tokenizer,
        end_of_turn_ids(tokenizer, target.generation_config),
        arguments.decoding,
        arguments.batch_size,
        arguments.drop_cut_answers,
    )
    return answerer, target_identity(target, tokenizer)


def target_identity(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What the answers depend on besides the arguments."""
    generation_config = json.loads(target.generation_config.to_json_string(ignore_metadata=True))
    spelling = tokenizer.backend_tokenizer.to_str() + "\0" + tokenizer.get_chat_template()
    return {
        "--target-dtype": str(target.dtype).removeprefix("torch."),
        "weights of --model-path": weights_sha256(target),
        "tokenizer of --model-path": hashlib.sha256(spelling.encode()).hexdigest(),
        "generation config of --model-path": json.dumps(generation_config, sort_keys=True),
    }


def report(job: Regeneration, arguments: RegenerationArguments, state: PartialState, seconds: float) -> None:
    """Says what there is; a process that finds every shard complete writes `provenance.json`."""
    shards = job.shards
    if shards.num_complete() < shards.num_shards:
        logger.info("The shards of this process are complete; others are still at work.")
        return
    facts = RegenerationFacts(
        argv=command_line(),
        target=arguments.model_path or arguments.endpoint_model,
        dataset=arguments.dataset,
        dataset_split=arguments.dataset_split,
        data_sha256=shards.request()["rows of --dataset"],
        seconds=seconds,
        device=device_name(state.device) if arguments.endpoint is None else arguments.endpoint,
        num_processes=state.num_processes,
        result=total_record(shards.read_records()),
    )
    shards.write_record(shards.records / "provenance.json", provenance(facts), state.process_index)
    for line in summary(facts.result, arguments):
        logger.info(line)


def summary(result: dict, arguments: RegenerationArguments) -> list[str]:
    """What a user should know about the result, a line for each."""
    lines = [
        f"{arguments.output_dir} holds {result['num_rows']} rows with {result['num_answers']} answers of the target "
        f"({result['num_answer_tokens']} tokens), {result['num_cut']} of them cut by --max-new-tokens."
    ]
    lines += [f"{count} conversations left out: {reason}." for reason, count in result["left_out"].items()]
    lines += [f"{count} conversations ended early: {reason}." for reason, count in result["ended_early"].items()]
    if result["num_cut"] and arguments.output_format == "messages":
        lines.append("Training learns an end of turn behind each answer that was cut, which the target never said.")
    if result["num_unreproduced"]:
        lines.append(
            f"{result['num_unreproduced']} conversations are not rendered into the tokens that the target saw and "
            "said; `--output-format tokens` keeps these exactly."
        )
    if result["num_rows"] == 0:
        lines.append("There is nothing to train on.")
    return lines


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
