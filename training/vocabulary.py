"""The draft vocabulary: the tokens that the assistant says most often.

A smaller vocabulary makes the draft's `lm_head`, most of its weights, smaller; a target token outside it can never be
accepted. Coverage, the share of supervised tokens inside, bounds what that costs.
"""

import logging
from collections.abc import Iterable

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

logger = logging.getLogger(__name__)


def count_supervised_tokens(rows: Dataset, vocab_size: int) -> Tensor:
    """
    How often the assistant said each token, `(V,)`.

    Raises:
        ValueError: If the tokenizer knows tokens that the target does not.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in rows.select_columns(["input_ids", "loss_mask"]).with_format("numpy").iter(1000):
        input_ids, loss_mask = np.concatenate(batch["input_ids"]), np.concatenate(batch["loss_mask"])
        if input_ids.max() >= vocab_size:
            raise ValueError(
                f"The tokenizer gives token id {input_ids.max()}, the target's `vocab_size` is {vocab_size}."
            )
        counts += np.bincount(input_ids[loss_mask == 1], minlength=vocab_size)
    return torch.from_numpy(counts)


def choose_draft_vocabulary(counts: Tensor, size: int, required_ids: Iterable[int] = ()) -> Tensor:
    """
    The `size` most frequent tokens, the lower id first where counts are equal.

    Args:
        counts (`torch.LongTensor` of shape `(V,)`): Occurrences of every target token.
        size (`int`): Draft vocabulary.
        required_ids (`Iterable[int]`, *optional*): Ids that are in whatever their count: the ends of a turn.

    Returns:
        `torch.LongTensor` of shape `(size,)`, in rising order.

    Raises:
        ValueError: If `size` exceeds the target's vocabulary or cannot hold `required_ids`.
    """
    required = sorted({token for token in required_ids if token < len(counts)})
    if not len(required) <= size <= len(counts):
        raise ValueError(
            f"`draft_vocab_size` must be between {len(required)} and the target's {len(counts)}, got {size}."
        )
    ranked = counts.clone()
    ranked[required] = counts.max() + 1
    draft_ids = ranked.argsort(descending=True, stable=True)[:size].sort().values
    covered = counts[draft_ids].sum().item() / max(counts.sum().item(), 1)
    logger.info("Draft vocabulary: %d of %d tokens, %.2f %% of the supervised text.", size, len(counts), 100 * covered)
    return draft_ids
