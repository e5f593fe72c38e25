"""The data of a run, from their names to training rows: load, tokenize, weigh, count.

Every source is tokenized by itself and cached on disk under the content of data, tokenizer, chat template and options,
so that adding a source, or giving one another weight, does not tokenize the others again. Whatever can be wrong with
the data is found here, before any model is loaded.
"""

import datetime
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import transformers
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .arguments import DataArguments, DataSource
from .sources import load_conversations
from .tokenization import RowTokenizer, TokenizationOptions

logger = logging.getLogger(__name__)

# Rows of a source in an epoch; above, the list of them alone takes gigabytes.
MAX_WEIGHED_ROWS = 10**8
# Part of the cache key: change it whenever the same input gives other rows.
TOKENIZATION_VERSION = 5
ROW_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "loss_mask": List(Value("int8")),
        "length": Value("int64"),
        "is_supervised": Value("bool"),
        "refusal": Value("string"),
    }
)


@dataclass(frozen=True)
class SourceReport:
    """
    What became of the rows of a source.

    Args:
        name (`str`): As it was named in the command.
        num_rows (`int`): Rows that were read.
        num_refused (`int`): Rows that could not be used, with `--skip-bad-rows`.
        first_refusal (`str`, *optional*): Why the first of them could not.
        num_unsupervised (`int`): Rows that teach nothing: no two tokens of the assistant in a row before the cut.
        num_cut (`int`): Rows that reach `max_length`.
        num_used (`int`): Rows per epoch, by the weight.
    """

    name: str
    num_rows: int
    num_refused: int
    first_refusal: str | None
    num_unsupervised: int
    num_cut: int
    num_used: int


@dataclass(frozen=True)
class PreparedRows:
    """
    Training rows, and where they come from.

    Args:
        rows (`Dataset`): With `input_ids`, `loss_mask` and `length`.
        sources (`list[SourceReport]`): One for each name.
    """

    rows: Dataset
    sources: list[SourceReport]

    @property
    def num_dropped(self) -> int:
        """Rows that were read and cannot be learnt from."""
        return sum(source.num_refused + source.num_unsupervised for source in self.sources)


def prepare_rows(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None = None,
    end_token_ids: Iterable[int] = (),
    seed: int = 0,
) -> PreparedRows:
    """
    The training rows of all sources, each as often as its weight says.

    Args:
        data ([`DataArguments`]): With `dataset`.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        vocab_size (`int`, *optional*): The target's.
        end_token_ids (`Iterable[int]`, *optional*): Tokens that end generation, from `end_of_turn_ids`.
        seed (`int`, *optional*, defaults to 0): Of the choice of rows where a weight is not whole.

    Raises:
        ValueError: If a source cannot be read, a row cannot be used, or nothing is left.
    """
    options = TokenizationOptions(
        max_length=data.max_length,
        last_turn_only=data.train_on_last_turn_only,
        skip_bad_rows=data.skip_bad_rows,
        vocab_size=vocab_size,
        end_token_ids=tuple(sorted(set(end_token_ids))),
    )
    parts, reports = [], []
    for index, source in enumerate(data.sources()):
        loaded = load_conversations(source.dataset, source.split, source.config, data.streaming, data.max_rows)
        tokenized = _tokenize(loaded, tokenizer, options, source.dataset, data.preprocessing_workers)
        usable = np.flatnonzero(tokenized["is_supervised"])
        check_weight(source, len(usable))
        chosen = weigh_rows(usable, source.weight, (seed, index))
        parts.append(tokenized.select(chosen).select_columns(["input_ids", "loss_mask", "length"]))
        reports.append(_report(tokenized, options, source.dataset, len(chosen)))
    rows = concatenate_datasets(parts)
    if len(rows) == 0:
        _refuse_empty(reports, data.max_length)
    return PreparedRows(rows, reports)


def tokenize_conversations(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, **options: Any
) -> Dataset:
    """
    Training rows of one source with `input_ids`, `loss_mask` and `length`, each once.

    Args:
        rows (`Dataset`): From `load_conversations`.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        max_length (`int`): Longer documents are cut at the end.
        options: More of [`TokenizationOptions`].

    Returns:
        `Dataset` without the rows that have no supervised position; their number is logged.

    Raises:
        ValueError: If a row cannot be used, or no row is left.
    """
    settings = TokenizationOptions(max_length=max_length, **options)
    tokenized = _tokenize(rows, tokenizer, settings, "the dataset", None)
    chosen = np.flatnonzero(tokenized["is_supervised"])
    report = _report(tokenized, settings, "the dataset", len(chosen))
    if len(chosen) == 0:
        _refuse_empty([report], max_length)
    return tokenized.select(chosen).select_columns(["input_ids", "loss_mask", "length"])


def check_weight(source: DataSource, num_usable: int) -> None:
    """
    Requires that a source's weight gives it a row in an epoch, and not more rows than can be listed.

    Args:
        source ([`DataSource`]): With `weight`.
        num_usable (`int`): Its rows that can be learnt from; without any, no weight is wrong.

    Raises:
        ValueError: Names the source and its weight.
    """
    num_rows = source.weight * num_usable
    if num_usable > 0 and not 0.5 < num_rows <= MAX_WEIGHED_ROWS:
        raise ValueError(
            f"`--dataset-weights` must give between 1 and {MAX_WEIGHED_ROWS} rows of {source.dataset} in an epoch, "
            f"got {source.weight}, which makes {num_rows:.3g} of its {num_usable}."
        )


def weigh_rows(indices: np.ndarray, weight: float, seed: tuple[int, ...]) -> np.ndarray:
    """
    Rows of a source for one epoch: all of them as often as the whole part of the weight says, and the share of them
    that is its fraction once more, drawn without replacement; in their order.

    Args:
        indices (`np.ndarray`): The rows that can be used.
        weight (`float`): 2 is each row twice, 0.5 is half of the rows.
        seed (`tuple[int, ...]`): Of the draw.
    """
    whole = int(weight)
    num_extra = round((weight - whole) * len(indices))
    extra = np.random.default_rng(seed).choice(indices, num_extra, replace=False)
    return np.sort(np.concatenate([np.tile(indices, whole), extra]), kind="stable")


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Tokens that end generation, by the tokenizer and by the target's generation config."""
    configured = None if generation_config is None else generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return [token for token in dict.fromkeys(ids) if token is not None]


def load_generation_config(model_path: str, target_config: PreTrainedConfig) -> GenerationConfig:
    """The target's generation config without the target; what its configuration says where there is none."""
    try:
        return GenerationConfig.from_pretrained(model_path)
    except OSError:
        return GenerationConfig.from_model_config(target_config)


def content_hash(rows: Dataset) -> str:
    """SHA-256 of the tokens and masks that are trained on, in their order."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["input_ids", "loss_mask"]).with_format("numpy").iter(1000):
        for input_ids, loss_mask in zip(batch["input_ids"], batch["loss_mask"], strict=True):
            digest.update(np.stack([input_ids, loss_mask]).astype("<i8").tobytes())
    return digest.hexdigest()


def _tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions, name: str, num_workers: int | None
) -> Dataset:
    """All rows of a source with the columns of `ROW_FEATURES`, from the cache if they are there."""
    return rows.map(
        RowTokenizer(tokenizer, options, name),
        with_indices=True,
        remove_columns=rows.column_names,
        features=ROW_FEATURES,
        num_proc=num_workers,
        new_fingerprint=_cache_key(rows, tokenizer, options),
        desc=f"Tokenizing {name}",
    )


def _report(tokenized: Dataset, options: TokenizationOptions, name: str, num_used: int) -> SourceReport:
    """What became of the rows. **Effects**: logs what was left out."""
    refusals = [refusal for refusal in tokenized["refusal"] if refusal is not None]
    num_unsupervised = len(tokenized) - len(refusals) - int(np.count_nonzero(tokenized["is_supervised"]))
    num_cut = int((np.asarray(tokenized["length"]) >= options.max_length).sum())
    if refusals:
        logger.warning("Skipped %d of %d rows of %s: %s", len(refusals), len(tokenized), name, refusals[0])
    if num_unsupervised:
        logger.info("Dropped %d of %d rows without a supervised position.", num_unsupervised, len(tokenized))
    first_refusal = refusals[0] if refusals else None
    return SourceReport(name, len(tokenized), len(refusals), first_refusal, num_unsupervised, num_cut, num_used)


def _refuse_empty(reports: list[SourceReport], max_length: int) -> None:
    """Raises `ValueError`, since there is nothing to train on."""
    refusal = next((report.first_refusal for report in reports if report.first_refusal is not None), None)
    if refusal is not None:
        raise ValueError(f"No row of the data can be used. The first one that was skipped: {refusal}")
    raise ValueError(
        f"No document has two assistant tokens in a row within its first {max_length} tokens. "
        "Raise `--max-length`, or look at the rows with `--inspect-data 3`."
    )


def _cache_key(rows: Dataset, tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions) -> str:
    """Everything that decides what the training rows of `rows` are."""
    template = str(tokenizer.chat_template)
    parts = [
        rows._fingerprint,
        tokenizer.backend_tokenizer.to_str(),
        str(sorted(tokenizer.special_tokens_map.items())),
        template,
        # Such a template writes the date into its text.
        str(datetime.date.today()) if "strftime_now" in template else "",
        str(asdict(options)),
        transformers.__version__,
        str(TOKENIZATION_VERSION),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
