"""Stored states in a batch: they go where their documents lie, whoever laid these out.

Shapes: B batch, T tokens, Dt the target's hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .documents import place
from .feature_shards import STATES


class FeatureCollator:
    """
    Lays documents out with another collator and adds their states.

    Args:
        collator (`Callable`): Makes `input_ids`, `loss_mask` and `document_ids`, each `(B, T)`, of rows; by padding or
            packing, every document whole and in the order of the rows.
    """

    def __init__(self, collator: Callable[[list[dict]], dict[str, Tensor]]):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """The collator's batch with `aux_hidden_states (B, T, 3 * Dt)` and `last_hidden_states (B, T, Dt)`."""
        batch = self.collator([{name: value for name, value in row.items() if name not in STATES} for row in rows])
        is_document = batch["document_ids"] > 0
        return batch | {name: place(torch.cat([row[name] for row in rows]), is_document) for name in STATES}
