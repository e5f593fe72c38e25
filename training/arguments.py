"""What the training command can be told: the data, the draft, and everything that `transformers.Trainer` knows."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

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


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = field(metadata={"help": "JSONL or Parquet file, directory, or Hub id of conversations."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset or a saved DatasetDict."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a conversation; longer ones are cut."})

    def __post_init__(self):
        if self.max_length < 3:
            raise ValueError(f"`--max-length` must be at least 3, got {self.max_length}.")


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
    draft_vocab_size: int | None = field(
        default=None,
        metadata={"help": f"Tokens the draft can predict. Default: {DEFAULT_DRAFT_VOCAB_SIZE}, at most the target's."},
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

    def set_default_learning_rate(self, hidden_size: int) -> None:
        """Adam's best rate falls with the width (arXiv:2203.03466, Table 3); at width 256, 4e-3 was measured best."""
        if self.learning_rate is None:
            self.learning_rate = 1 / hidden_size

    def __post_init__(self):
        if self.num_ttt_steps < 1:
            raise ValueError(f"`--num-ttt-steps` must be at least 1, got {self.num_ttt_steps}.")
        if self.ttt_decay <= 0:
            raise ValueError(f"`--ttt-decay` must be positive, got {self.ttt_decay}.")
        if self.bf16 is None:
            wants_default = not (self.fp16 or self.use_cpu)
            self.bf16 = wants_default and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.dataloader_pin_memory &= torch.cuda.is_available()
        super().__post_init__()
