"""How a token is chosen, so that one seed gives the text of plain `generate()`.

`torch.multinomial(probs, 1)` is `argmax(probs / e)` with `e` exponential noise of the shape of `probs`. Plain sampling
draws one `e (B, V)` per new token, in order. `Noise` draws the same ones ahead, from a private generator that starts
at the state of the public one; the draft reads the noise of the coming tokens and proposes what will be chosen. The
public generator moves on only when a token is committed, so at every moment, an exception included, its state is the
one that plain sampling would have left behind.

Shapes: B batch, V the target's vocabulary.
"""

from collections import deque
from typing import NoReturn

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from .top_tokens import highest

# Warpers that look at the scores alone, hence also at a draft's.
STATELESS_WARPERS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
)
# Those whose default generator is known.
DEVICES = ("cpu", "cuda")


class Noise:
    """
    The exponential noise of the coming tokens, in the order in which plain sampling draws it.

    Args:
        like (`torch.Tensor` of shape `(B, V)`):
            Scores of one step: shape, dtype and device of one draw.

    Raises:
        NotImplementedError: If the device's default generator is not known.
    """

    def __init__(self, like: Tensor):
        self.like = like
        self.public = default_generator(like.device)
        self.private = torch.Generator(device=like.device)
        self._start_over()

    def peek(self, ahead: int) -> Tensor:
        """Noise `(B, V)` of the token that is `ahead` places after the next one."""
        while len(self.draws) <= ahead:
            noise = torch.empty_like(self.like).exponential_(1, generator=self.private)
            self.draws.append((noise, self.private.get_state()))
        return self.draws[ahead][0]

    def spend(self) -> Tensor:
        """
        Noise `(B, V)` of the next token, which is now committed.

        **Effects**: moves the public generator to where plain sampling leaves it after this token. Where somebody else
        has drawn from it meanwhile (a logits processor, say), what was drawn ahead is void and drawn anew.
        """
        if not torch.equal(self.public.get_state(), self.committed_state):
            self._start_over()
        self.peek(0)
        noise, self.committed_state = self.draws.popleft()
        self.public.set_state(self.committed_state)
        return noise

    def _start_over(self) -> None:
        self.committed_state = self.public.get_state()
        self.private.set_state(self.committed_state)
        self.draws: deque[tuple[Tensor, Tensor]] = deque()


class RowNoise:
    """
    The noise of sequences that are not at the same place.

    Args:
        noise ([`Noise`]): Its next token is that of the sequences that are furthest behind.
        leads (`list[int]`): How many tokens each sequence is ahead of these.
    """

    def __init__(self, noise: Noise, leads: list[int]):
        self.noise, self.leads = noise, leads

    def peek(self, ahead: int) -> Tensor:
        """Noise `(B, V)` of the token that is `ahead` places after each sequence's next one."""
        if len(set(self.leads)) == 1:
            return self.noise.peek(self.leads[0] + ahead)
        return torch.stack([self.noise.peek(lead + ahead)[row] for row, lead in enumerate(self.leads)])


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that `torch.multinomial` uses on `device`."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    raise NotImplementedError(
        f"Sampling with a draft is supported on `cpu` and `cuda`, got `{device.type}`. Pass `do_sample=False`."
    )


def check_distribution(scores: Tensor) -> None:
    """
    Requires scores `(B, V)` that are a distribution after the softmax, as `torch.multinomial` does.

    Raises:
        RuntimeError: If one is NaN or infinite, or all are minus infinity.
    """
    if not is_distribution(scores).all():
        raise_no_distribution()


def is_distribution(scores: Tensor) -> Tensor:
    """Whether scores `(..., V)` are a distribution after the softmax."""
    return scores.max(dim=-1).values.isfinite()


def raise_no_distribution() -> NoReturn:
    """
    Raises what `torch.multinomial` raises.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


def choose_token(scores: Tensor, noise: Tensor | None) -> Tensor:
    """
    The token that plain decoding chooses from processed scores, `(B, V)` -> `(B,)`.

    Args:
        scores (`torch.Tensor` of shape `(B, V)`): What the logits processors returned.
        noise (`torch.Tensor` of shape `(B, V)`, *optional*): Of `Noise`; `None` means greedy.
    """
    if noise is None:
        return highest(scores)
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)


def stateless_warpers(logits_processor: LogitsProcessorList) -> LogitsProcessorList:
    """Those of the target's processors that can be applied to the draft's scores."""
    return LogitsProcessorList(filter(is_stateless, logits_processor))


def is_stateless(processor: LogitsProcessor) -> bool:
    """Whether a processor looks at the scores alone."""
    return type(processor) in STATELESS_WARPERS
