"""The text so far, and the one step by which it grows: process scores, choose a token, append it, ask whether to stop.

This is plain `generate()`'s step, in its order and with its arguments, taken once per emitted token. Whatever depends
on the prefix (repetition penalty, grammar, stop strings, a processor with a state of its own) therefore sees exactly
what it sees in plain generation, and no token is emitted after the one that stops it.

Where a criterion knows an end-of-sequence token, a sequence that met any criterion is frozen: it gets padding, as in
plain generation, until all have met one. Otherwise all go on together.

Shapes: B batch, T tokens, V the target's vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .sampling import DEVICES, Noise, check_distribution, choose_token, default_generator


@dataclass
class Transcript:
    """
    The committed tokens of one call.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`): Prompt and emitted tokens.
        logits_processor (`LogitsProcessorList`), stopping_criteria (`StoppingCriteriaList`): Of `generate()`.
        do_sample (`bool`): Whether tokens are drawn.
        pad_token_id (`torch.LongTensor` of shape `()`, *optional*): What frozen sequences get.
        scores (`tuple[torch.Tensor]`, *optional*): Processed scores `(B, V)` per emitted token, `None` if not wanted.
        logits (`tuple[torch.Tensor]`, *optional*): Raw logits `(B, V)` per emitted token, `None` if not wanted.
        streamer (`BaseStreamer`, *optional*): Gets every token with `flush`.
        num_omitted (`int`, *optional*, defaults to 0): Tokens of the target's cache that come before `input_ids`.
    """

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    pad_token_id: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    streamer: BaseStreamer | None = None
    num_omitted: int = 0
    noise: Noise | None = None
    is_finished: bool = False
    num_flushed: int = 0

    def __post_init__(self):
        self.num_flushed = self.input_ids.shape[1]
        is_streamed = self.streamer is not None and self.input_ids.device.type in DEVICES
        self.generator = default_generator(self.input_ids.device) if is_streamed else None
        self.random_states: list[Tensor | None] = []
        self.is_done = torch.zeros(len(self.input_ids), dtype=torch.bool, device=self.input_ids.device)
        self.freezes = any(hasattr(criterion, "eos_token_id") for criterion in self.stopping_criteria)

    @property
    def max_length(self) -> int:
        """Tokens that the least of the length limits allows; `stopping_criteria.max_length` is the first one."""
        return min(each.max_length for each in self.stopping_criteria if type(each) is MaxLengthCriteria)

    @property
    def eos_token_ids(self) -> Tensor | None:
        """The tokens by which transformers' own criteria end a sequence; `None`: there are none."""
        ids = [each.eos_token_id for each in self.stopping_criteria if type(each) is EosTokenCriteria]
        return torch.cat(ids).to(self.input_ids.device) if ids else None

    @property
    def max_new_tokens(self) -> int:
        """Tokens that the length limit still allows."""
        return self.max_length - self.input_ids.shape[1]

    @property
    def num_slots(self) -> int:
        """Slots of the target's cache for all of the text, its newest token included."""
        return self.num_omitted + self.input_ids.shape[1]

    @property
    def num_kept_slots(self) -> int:
        """Slots of the target's cache that hold the text even if the round that goes on now breaks off."""
        return self.num_omitted + self.num_flushed - 1

    @property
    def max_slots(self) -> int:
        """Slots of the target's cache for as many tokens as the length limit allows."""
        return self.num_omitted + self.max_length

    @property
    def is_frozen(self) -> Tensor:
        """The sequences that get nothing but padding from now on, bool `(B,)`."""
        return self.is_done if self.freezes else torch.zeros_like(self.is_done)

    def extend(self, logits: Tensor) -> Tensor:
        """
        Appends the tokens that plain generation chooses from `logits (B, V)`, fp32, and returns them, `(B,)`.

        **Effects**: moves the random generator by one draw when sampling; sets `is_finished` if all have met a
        criterion.
        """
        raw_logits = logits.clone() if self.logits is not None else None
        scores = self.logits_processor(self.input_ids, logits)
        if self.do_sample:
            check_distribution(scores)
            self.noise = self.noise or Noise(like=scores)
        tokens = choose_token(scores, self.noise.spend() if self.do_sample else None)
        if self.freezes and len(tokens) > 1:
            tokens = torch.where(self.is_done, self.pad_token_id, tokens)
        self.commit(torch.cat([self.input_ids, tokens[:, None]], dim=-1), scores, raw_logits)
        self.is_finished = bool(self.is_done.all())
        return tokens

    def commit(self, input_ids: Tensor, scores: Tensor | None, logits: Tensor | None) -> None:
        """
        Takes over `input_ids (B, T + 1)`, one token longer, and asks the criteria.

        Args:
            scores, logits (`torch.Tensor` of shape `(B, V)`, *optional*): Of that token, where they are wanted.

        **Effects**: `is_done` is up to date; whether all are done is left to the caller.
        """
        self.input_ids = input_ids
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        self.is_done = self.is_done | self.stopping_criteria(self.input_ids, self.scores)
        if self.streamer is not None:
            self.random_states.append(self.generator and self.generator.get_state())

    def move_to(self, device: torch.device | str) -> None:
        """Where the tokens are kept."""
        self.input_ids, self.is_done = self.input_ids.to(device), self.is_done.to(device)
        if self.pad_token_id is not None:
            self.pad_token_id = self.pad_token_id.to(device)

    def flush(self) -> None:
        """
        Hands the tokens that were appended since the last call to the streamer, one by one.

        **Effects**: the random generator stands, at each of them, where plain generation has it then, so that a
        streamer that raises leaves it there.
        """
        if self.streamer is not None:
            self._stream()
        self.num_flushed = self.input_ids.shape[1]

    def _stream(self) -> None:
        new_tokens, states = self.input_ids[:, self.num_flushed :].cpu().unbind(dim=1), self.random_states
        is_drawn = self.generator is not None and any(not torch.equal(state, states[-1]) for state in states)
        for tokens, state in zip(new_tokens, states, strict=True):
            if is_drawn:
                self.generator.set_state(state)
            self.streamer.put(tokens)
            if is_drawn and state is not states[-1] and not torch.equal(self.generator.get_state(), state):
                raise RuntimeError(
                    f"`streamer` ({type(self.streamer).__name__}) must not draw random numbers while tokens are "
                    "sampled, which would change them. Give it a generator of its own, or pass no `assistant_model`."
                )
        self.random_states.clear()
