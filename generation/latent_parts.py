"""What is left of attention to latents when its slots are split: parts, which a last kernel joins.

Shapes: B batch, P parts, H heads, W rows, C latent.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """
    What programs find out, each about some of the slots; one with nothing to do leaves its part as it was.

    Args:
        sums (`torch.Tensor` of shape `(B, P, H, W, C)`): Of weighted latents.
        maxima, totals (`torch.Tensor` of shape `(B, P, H, W)`): The largest score, and the sum of the weights.
        block_slots (`int`): Slots of a tile; parts are whole tiles.
    """

    sums: Tensor
    maxima: Tensor
    totals: Tensor
    block_slots: int

    @classmethod
    def empty(
        cls,
        query: Tensor,
        c_kv: Tensor,
        programs_per_part: int,
        block_slots: int,
        max_programs: int,
        parts_per_program: int = 1,
    ) -> "Parts":
        """
        Parts to be filled, one for each tile at most, but whole programs.

        Args:
            query (`torch.Tensor` of shape `(B, H, W, d)`), c_kv (`torch.Tensor` of shape `(B, 1, T, C)`): The inputs.
            programs_per_part (`int`): For all sequences, heads and rows.
            max_programs (`int`): How many programs run at once.
            parts_per_program (`int`, defaults to 1): Parts, one behind the other, that a program works on.
        """
        num_slots, latent_dim = c_kv.shape[2:]
        # Not one program more than run at once: the last few would double the time.
        num_programs = min(-(-num_slots // (parts_per_program * block_slots)), max_programs // programs_per_part)
        num_parts = parts_per_program * max(1, num_programs)
        batch_size, num_heads, num_rows, _ = query.shape
        sums = query.new_empty(batch_size, num_parts, num_heads, num_rows, latent_dim, dtype=torch.float32)
        maxima, totals = query.new_empty(2, *sums.shape[:-1], dtype=torch.float32)
        return cls(sums, maxima, totals, block_slots)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
