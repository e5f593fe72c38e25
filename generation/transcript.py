"""The text so far, and the one step by which it grows: process scores, choose a token, append it, ask whether to stop.

This is plain `generate()`'s step, in its order and with its arguments, taken once per emitted token. Whatever depends
on the prefix (repetition penalty, grammar, stop strings, a processor with a state of its own) therefore sees exactly
what it sees in plain generation, and no token is emitted after the one that stops it.

Shapes: B batch (1), T tokens, V the target's vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .sampling import Noise, check_distribution, choose_token


@dataclass
class Transcript:
    """
    The committed tokens of one call.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, T)`): Prompt and emitted tokens.
        logits_processor (`LogitsProcessorList`), stopping_criteria (`StoppingCriteriaList`): Of `generate()`.
        do_sample (`bool`): Whether tokens are drawn.
        scores (`tuple[torch.Tensor]`, *optional*): Processed scores `(1, V)` per emitted token, `None` if not wanted.
        logits (`tuple[torch.Tensor]`, *optional*): Raw logits `(1, V)` per emitted token, `None` if not wanted.
        streamer (`BaseStreamer`, *optional*): Gets every token with `flush`.
    """

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    streamer: BaseStreamer | None = None
    noise: Noise | None = None
    is_finished: bool = False
    num_flushed: int = 0

    def __post_init__(self):
        self.num_flushed = self.input_ids.shape[1]

    @property
    def max_new_tokens(self) -> int:
        """Tokens that the length limit still allows."""
        return self.stopping_criteria.max_length - self.input_ids.shape[1]

    def extend(self, logits: Tensor) -> int:
        """
        Appends the token that plain generation chooses from `logits (1, V)`, fp32, and returns it.

        **Effects**: moves the random generator by one draw when sampling; sets `is_finished` if a criterion stops.
        """
        raw_logits = logits.clone() if self.logits is not None else None
        scores = self.logits_processor(self.input_ids, logits)
        if self.do_sample:
            check_distribution(scores)
            self.noise = self.noise or Noise(like=scores)
        token = choose_token(scores, self.noise.spend() if self.do_sample else None)
        self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw_logits,)
        self.is_finished = bool(self.stopping_criteria(self.input_ids, self.scores).all())
        return int(token)

    def flush(self) -> None:
        """Hands the tokens that were appended since the last call to the streamer, one by one."""
        if self.streamer is None:
            return
        for token in self.input_ids[0, self.num_flushed :].cpu():
            self.streamer.put(token[None])
        self.num_flushed = self.input_ids.shape[1]
