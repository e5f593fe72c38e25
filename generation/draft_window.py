"""Which of its past rows a row of the draft sees in a long text.

With a window, the row at position p sees itself and

    j < sink   or   p - window < j < p

The first rows stay because attention that has nothing to look for goes there (StreamingLLM, arXiv:2309.17453). Unlike
there, keys keep the RoPE positions that they have in the text.

Shapes: B batch, Q queries, K keys.
"""

from dataclasses import dataclass

from torch import Tensor

# Four initial tokens restore the perplexity of a window, further ones add little (arXiv:2309.17453, Table 2).
DEFAULT_SINK = 4


@dataclass(frozen=True)
class DraftWindow:
    """
    What rows see of rows that were made from true states; the nodes of a tree always see their ancestors.

    Args:
        size (`int`): Rows that a row sees, itself included, besides the first ones.
        sink (`int`): First rows that all see.
    """

    size: int
    sink: int

    def hides(self, position: int) -> bool:
        """Whether the row at `position` does not see all rows before it."""
        return position >= self.sink + self.size

    def shows(self, positions: Tensor, key_positions: Tensor) -> Tensor:
        """Whether rows at `positions (B, Q)` see earlier ones at `key_positions (B, K)`, bool `(B, Q, K)`."""
        key_positions = key_positions[:, None]
        return (key_positions < self.sink) | (key_positions > positions[..., None] - self.size)

    def num_unseen(self, num_rows: int) -> int:
        """How many of the first rows behind the sink nobody will see any more who comes after `num_rows` rows."""
        return max(0, num_rows + 1 - self.size - self.sink)
