"""What the training command can be told: the data, the draft, and everything that `transformers.Trainer` knows."""

import math
import os
from dataclasses import dataclass, field

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from .losses import LOSSES

# Command-line name of a backend -> attention type of the draft, attention implementation of its model.
ATTENTION_BACKENDS = {
    "flex_attention_mla": ("mla", "flex_attention"),
    "sdpa_mla": ("mla", "sdpa"),
    "eager_mla": ("mla", "eager"),
    "flex_attention": ("gqa", "flex_attention"),
    "sdpa": ("gqa", "sdpa"),
    "eager": ("gqa", "eager"),
}
# Rows of the draft's `lm_head` where the target has more: EAGLE-3's choice (arXiv:2503.01840) and its successors'.
DEFAULT_DRAFT_VOCAB_SIZE = 32000
# `--draft-vocab-size` for all tokens of the target.
FULL_VOCABULARY = "full"
# Muon's peak rate over that of AdamW.
MUON_RATE_FACTOR = 3
# NumPy's generator takes no larger seed.
LARGEST_SEED = 2**32 - 1
# What a number must be, in words and as a test that "not a number" fails, and the arguments that must be so.
BOUNDS = {
    "at least 1": (
        lambda value: value >= 1,
        ("num_ttt_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    ),
    "at least 0 and finite": (
        lambda value: 0 <= value < math.inf,
        ("learning_rate", "muon_learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"),
    ),
    "above 0 and finite": (
        lambda value: 0 < value < math.inf,
        ("ttt_decay", "num_train_epochs", "logging_steps", "save_steps", "adam_epsilon"),
    ),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2")),
    f"between 0 and {LARGEST_SEED}": (lambda value: 0 <= value <= LARGEST_SEED, ("seed", "data_seed")),
}
# Arguments of the Trainer that need what a draft's training does not have.
UNSUPPORTED = {
    "neftune_noise_alpha": "the draft reads the target's embeddings",
    "eval_on_start": "there is no evaluation in training",
    "use_liger_kernel": "its kernels know no draft",
}


@dataclass(frozen=True)
class DataSource:
    """
    One of the datasets that a run learns from.

    Args:
        dataset (`str`): File, directory or Hub id.
        split (`str`): Split of a Hub dataset or a saved `DatasetDict`.
        config (`str`, *optional*): Configuration of a Hub dataset.
        weight (`float`): How often its rows come in an epoch.
    """

    dataset: str
    split: str
    config: str | None
    weight: float


@dataclass
class DataArguments:
    """What to train on."""

    dataset: list[str] | None = field(
        default=None, metadata={"help": "JSON, JSONL or Parquet files, directories, or Hub ids; one or several."}
    )
    features: str | None = field(
        default=None, metadata={"help": "Directory of scripts/prepare_features.py, in the place of `--dataset`."}
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "How often the rows of each dataset come in an epoch: 2 twice, 0.5 half of them. Default: 1."
        },
    )
    dataset_split: list[str] | None = field(
        default=None,
        metadata={"help": "Split of a Hub dataset or a saved DatasetDict, one for all or each. Default: train."},
    )
    dataset_config: list[str] | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, one for all or each."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read no more than the first `--max-rows` rows of a Hub dataset."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Only the first rows of each dataset. Default: all."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a document; longer ones are cut."})
    train_on_last_turn_only: bool = field(
        default=False, metadata={"help": "Learn from the last answer of each conversation only."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out rows that cannot be used, and say how many; otherwise an error."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Put several documents into a row of `--max-length` tokens."}
    )
    pad_to_multiple_of: int = field(
        default=1, metadata={"help": "Pad batches to a multiple of this; `--max-length` itself gives one shape."}
    )
    preprocessing_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize. Default: this one."}
    )
    inspect_data: int | None = field(
        default=None, metadata={"help": "Do not train: print this many rows with what is learnt from them in colour."}
    )

    def sources(self) -> list[DataSource]:
        """The datasets with what belongs to each."""
        num = len(self.dataset)
        splits, configs = self._for_each("dataset_split", "train"), self._for_each("dataset_config", None)
        weights = self.dataset_weights or [1.0] * num
        return [DataSource(*source) for source in zip(self.dataset, splits, configs, weights, strict=True)]

    @property
    def dataset_name(self) -> str:
        """The datasets in one line."""
        return ", ".join(self.dataset)

    @property
    def split_name(self) -> str:
        """Their splits in one line; one word where all have the same."""
        return ", ".join(dict.fromkeys(self._for_each("dataset_split", "train")))

    def _for_each(self, name: str, default: str | None) -> list[str | None]:
        """The argument's value for each dataset."""
        values = getattr(self, name) or [default]
        if len(values) not in (1, len(self.dataset)):
            flag = name.replace("_", "-")
            raise ValueError(
                f"`--{flag}` must be given once, or once for each of {len(self.dataset)} datasets, got {len(values)}."
            )
        return values * len(self.dataset) if len(values) == 1 else values

    def __post_init__(self):
        if (self.dataset is None) == (self.features is None):
            raise ValueError("Exactly one of `--dataset` and `--features` must be given.")
        at_least_one = ("max_rows", "pad_to_multiple_of", "preprocessing_workers", "inspect_data")
        for name, least in (("max_length", 3), *((name, 1) for name in at_least_one)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`--{name.replace('_', '-')}` must be at least {least}, got {value}.")
        if self.inspect_data is not None and self.features is not None:
            raise ValueError(
                "`--inspect-data` needs `--dataset`: stored features were inspected before they were made."
            )
        if self.streaming and self.max_rows is None:
            raise ValueError("`--streaming` needs `--max-rows`, the number of rows to read.")
        if self.dataset is not None:
            self._check_sources()

    def _check_sources(self) -> None:
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset):
            raise ValueError(
                f"`--dataset-weights` must have one weight for each of {len(self.dataset)} datasets, got "
                f"{len(self.dataset_weights)}."
            )
        # Not a number fails this comparison, too.
        wrong = [weight for weight in self.dataset_weights or [] if not 0 < weight < math.inf]
        if wrong:
            raise ValueError(f"`--dataset-weights` must be above 0 and finite, got {wrong[0]}.")
        self.sources()


@dataclass
class DraftArguments:
    """Which target, and what the draft looks like; what is not given is taken from the target."""

    model_path: str = field(metadata={"help": "The target: a local directory or a Hub id."})
    attention_backend: str = field(
        default="flex_attention_mla",
        metadata={
            "help": "Names ending in _mla train a latent-attention head, the others a standard one.",
            "choices": list(ATTENTION_BACKENDS),
        },
    )
    draft_vocab_size: str | None = field(
        default=None,
        metadata={"help": f"Tokens the draft can predict, or full. Default: {DEFAULT_DRAFT_VOCAB_SIZE}, at most all."},
    )
    mla_latent_dim: int | None = field(
        default=None, metadata={"help": "Cached numbers per token. Default: num_key_value_heads * head_dim / 4."}
    )
    mla_rope_dim: int | None = field(default=None, metadata={"help": "0 (default): RoPE on the up-projected keys."})
    target_dtype: str = field(
        default="auto",
        metadata={
            "help": "auto: the checkpoint's on a GPU, float32 on a CPU.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )

    target_device_map: str | None = field(
        default=None, metadata={"help": "auto: spread the target over all devices that the one process sees."}
    )
    shard_target: bool = field(
        default=False, metadata={"help": "Spread the target's layers over the processes (FSDP2); the draft is not."}
    )
    target_forward: str = field(
        default="batch",
        metadata={
            "help": "document: the target reads documents one by one, as for stored features; slower, and its states "
            "do not depend on the batch.",
            "choices": ["batch", "document"],
        },
    )
    embed_residual: bool = field(
        default=False, metadata={"help": "A row learns of its own token past the latent too; engines do not know it."}
    )
    fc_norm: bool = field(default=False, metadata={"help": "One RMSNorm for each auxiliary state, as in EAGLE-3.1."})
    norm_output: bool = field(
        default=False, metadata={"help": "Feed the state back after the final norm, as in EAGLE-3.1."}
    )
    draft_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A trained draft to go on from: a local directory or a Hub id. Its vocabulary is kept."},
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train a LoRA adapter of this rank on `--draft-checkpoint`, not the draft."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapter counts alpha / rank times. Default: twice the rank."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers with an adapter. Default: all but lm_head."}
    )

    def num_draft_tokens(self, vocab_size: int) -> int:
        """
        Rows of the draft's `lm_head` for a target with `vocab_size` tokens.

        Raises:
            ValueError: If that is asked for what cannot be.
        """
        if self.draft_vocab_size is None:
            return min(DEFAULT_DRAFT_VOCAB_SIZE, vocab_size)
        if self.draft_vocab_size == FULL_VOCABULARY:
            return vocab_size
        if not isinstance(self.draft_vocab_size, int) or not 1 <= self.draft_vocab_size <= vocab_size:
            raise ValueError(
                f"`--draft-vocab-size` must be between 1 and the target's {vocab_size}, or {FULL_VOCABULARY}, got "
                f"{self.draft_vocab_size}."
            )
        return self.draft_vocab_size

    def __post_init__(self):
        if str(self.draft_vocab_size).isdecimal():
            self.draft_vocab_size = int(self.draft_vocab_size)
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_target_modules is not None):
            raise ValueError("`--lora-alpha` and `--lora-target-modules` need `--lora-rank`.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`--lora-rank` must be at least 1, got {self.lora_rank}.")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"`--lora-alpha` must be above 0 and finite, got {self.lora_alpha}.")
        if self.lora_rank is not None and self.draft_checkpoint is None:
            raise ValueError("`--lora-rank` trains an adapter of a trained draft. Name it with `--draft-checkpoint`.")
        if self.target_forward == "document" and self.shard_target:
            raise ValueError(
                "`--target-forward document` and `--shard-target` exclude each other: processes with different "
                "numbers of documents would wait for each other for ever."
            )
        if self.target_device_map is not None and self.shard_target:
            raise ValueError("`--target-device-map` serves one process, `--shard-target` several: give one of them.")

    @property
    def attention_type(self) -> str:
        return ATTENTION_BACKENDS[self.attention_backend][0]

    @property
    def attn_implementation(self) -> str:
        return ATTENTION_BACKENDS[self.attention_backend][1]


@dataclass
class Eagle3TrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults of this task, and the unroll's own two numbers."""

    num_ttt_steps: int = field(default=7, metadata={"help": "Steps of training-time test."})
    ttt_decay: float = field(default=0.8, metadata={"help": "Weight of step k is this to the power of k."})
    ttt_step_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each step, in the place of the powers of `--ttt-decay`."}
    )
    loss: str = field(
        default="forward_kl",
        metadata={"help": "What a prediction is charged; see training/losses.py.", "choices": list(LOSSES)},
    )

    recompute_attention: bool = field(
        default=True,
        metadata={"help": "Attention is recomputed in the backward pass from latents; off costs memory, not results."},
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Release an average of the weights that keeps this share of itself per step."}
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak rate of Muon, which trains the matrices; 0: `--optim` trains them too. Default: 3 times "
            "`--learning-rate`; for an adapter, a sharded draft or another `--optim`, 0."
        },
    )

    diagnose: bool = field(
        default=False,
        metadata={"help": "Do not train: say why the acceptance is low, of `--draft-checkpoint` or of a new draft."},
    )

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Conversations per device and step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of AdamW. Default: 1 / hidden_size of the draft."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.015, metadata={"help": "Steps of warm-up, or a share of all below 1."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradients are clipped to this norm."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of metrics."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bfloat16. Default: on where a GPU has it."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is used at step 0."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator takes what it needs."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint, or no value for the newest one.", "nargs": "?", "const": "True"},
    )

    def set_default_rates(self, hidden_size: int, is_adapter: bool) -> None:
        """
        Adam's best rate falls with the width (arXiv:2203.03466, Table 3); at width 256, 4e-3 was measured best.

        Three times that was measured best for Muon (benchmarks/results/log.md).
        """
        if self.learning_rate is None:
            self.learning_rate = 1 / hidden_size
        is_default_optimizer = self.optim == TrainingArguments.optim
        if self.muon_learning_rate is None and is_default_optimizer and not is_adapter and not self.shards_the_draft:
            self.muon_learning_rate = MUON_RATE_FACTOR * self.learning_rate

    @property
    def shards_the_draft(self) -> bool:
        """True under FSDP and DeepSpeed, which give a process parts of a matrix or of its gradient."""
        by_launcher = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
        return by_launcher or bool(self.fsdp) or self.deepspeed is not None

    @property
    def global_batch_size(self) -> int:
        """Rows of a step over all processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def step_weights(self) -> list[float]:
        """Weight of each step in the loss."""
        return self.ttt_step_weights or [self.ttt_decay**ttt_step for ttt_step in range(self.num_ttt_steps)]

    def __post_init__(self):
        check_bounds(self)
        check_supported(self)
        self._check_step_weights()
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`--ema-decay` must be between 0 and 1, both excluded, got {self.ema_decay}.")
        if self.bf16 is None:
            wants_default = not (self.fp16 or self.use_cpu)
            self.bf16 = wants_default and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.dataloader_pin_memory &= torch.cuda.is_available()
        super().__post_init__()
        check_trackers(self.report_to)
        num_started = int(os.environ.get("WORLD_SIZE", "1"))
        if num_started != self.world_size:
            raise ValueError(
                f"The launcher started {num_started} processes, but each would train by itself. On a CPU, add "
                "`--use-cpu True`."
            )
        if self.diagnose and self.world_size > 1:
            raise ValueError(f"`--diagnose` runs in one process, got {self.world_size}. Start it without a launcher.")

    def _check_step_weights(self) -> None:
        """In float32, as the loss takes them."""
        name = "ttt_decay" if self.ttt_step_weights is None else "ttt_step_weights"
        given = getattr(self, name)
        if name == "ttt_step_weights" and len(given) != self.num_ttt_steps:
            raise ValueError(
                f"`--ttt-step-weights` must have one weight for each of {self.num_ttt_steps} steps, got {len(given)}."
            )
        weights = torch.tensor(given, dtype=torch.float64)
        if name == "ttt_decay":
            weights = weights ** torch.arange(self.num_ttt_steps)  # (K,)
        weights = weights.float()
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
            raise ValueError(
                f"`{as_flag(name)}` must give finite weights of at least 0, not all of them 0, got {given}."
            )


def as_flag(name: str) -> str:
    """An argument as it is written on the command line."""
    return "--" + name.replace("_", "-")


def check_bounds(args: Eagle3TrainingArguments) -> None:
    """
    Raises:
        ValueError: Names the first number that training cannot obey.
    """
    for words, (holds, names) in BOUNDS.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ValueError(f"`{as_flag(name)}` must be {words}, got {value}.")


def check_supported(args: Eagle3TrainingArguments) -> None:
    """
    Raises:
        ValueError: Names the first argument of the Trainer that is given and has nothing to act on.
    """
    for name, reason in UNSUPPORTED.items():
        value = getattr(args, name)
        if value is not None and value is not False:
            raise ValueError(f"`{as_flag(name)}` must be left out, got {value}: {reason}.")


def check_trackers(names: list[str]) -> None:
    """
    Makes those that transformers does not list as installed, as the Trainer will: each says itself what it needs.

    Raises:
        ValueError: If a tracker is unknown, or cannot be made.
    """
    installed = get_available_reporting_integrations()
    for name, callback in zip(names, get_reporting_integration_callbacks(names), strict=True):
        if name in installed:
            continue
        try:
            callback()
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"`--report-to` {name} cannot be used: {error}") from None
