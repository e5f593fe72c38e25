"""Sampling that belongs to the row: the same seed gives an answer the same tokens in every batch.

`torch.multinomial(p, 1)` is `argmax(p / e)` with e drawn from an exponential distribution. Here each row of the batch
draws its e from a generator of its own, and `generate()` takes the largest score. So a sampled answer is the text that
plain `generate(do_sample=True)` gives alone with the row's seed, whoever else is in the batch.

Shapes: B batch, T tokens, V vocabulary.
"""

import hashlib

import torch
from torch import Tensor
from transformers import LogitsProcessor


def row_seed(seed: int, number: int, turn: int) -> int:
    """Seed of one answer, 63 bits: a hash, so that neighbouring rows and seeds have nothing in common."""
    digest = hashlib.sha256(f"{seed}/{number}/{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class RowDraws(LogitsProcessor):
    """
    Turns scores into `p / e`, whose largest entry is a draw from p; comes after every other processor.

    Args:
        seeds (`list[int]` of length B): One per row.
        device (`torch.device`): Of the scores. A GPU's generator gives other numbers than the CPU's.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(B, T), (B, V) -> (B, V)`."""
        probs = scores.softmax(dim=-1, dtype=torch.float32)
        noise = torch.empty_like(probs)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(1, generator=generator)
        return probs / noise
