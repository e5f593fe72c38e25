"""How far a round may read where a target's RoPE factors depend on the length of the text.

"longrope", as in Phi-3, has two sets of factors, "dynamic" NTK scaling new ones for every length beyond the first.
Each forward takes those of its longest position, for all its tokens. So no forward of a round may reach from one side
of such a length to the other: near it trees become smaller, and the first token beyond it is read alone, as in plain
generation. There Phi-3 also drops its cache and reads the whole text again, with the other factors.

Beyond the length of "dynamic" scaling plain generation reads every token with factors of its own, and so do we.

Shapes: B batch, T tokens.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from .notices import warn_once
from .support import TreePlan
from .transcript import Transcript


@dataclass(frozen=True)
class ReadingLimits:
    """
    The lengths of a text, padding included, at which the target begins to read it otherwise.

    Args:
        switches (`tuple[int, ...]`): Up to each of them it is read in one way, beyond it in another.
        last (`int`, *optional*): Beyond it every token is read in its own way; `None`: there is no such length.
    """

    switches: tuple[int, ...] = ()
    last: int | None = None

    @classmethod
    def of(cls, target: PreTrainedModel, model_kwargs: dict) -> "ReadingLimits":
        """
        The limits of a call.

        Args:
            target (`PreTrainedModel`): Any target.
            model_kwargs (`dict`): Its generation state, whose last position is that of a token.
        """
        longrope, dynamic = rope_lengths(target.config.get_text_config(decoder=True))
        # Phi-3 and its kin compare the number of columns with it, whatever their RoPE.
        columns = getattr(target.config, "original_max_position_embeddings", None)
        switches = set() if columns is None else {columns}
        if longrope or dynamic:
            num_padding = least_padding(model_kwargs)
            switches |= {length + num_padding for length in longrope}
            dynamic = {length + num_padding for length in dynamic}
        return cls(tuple(sorted(switches)), min(dynamic, default=None))

    def room(self, num_tokens: int) -> int | None:
        """How many draft tokens may be read with the last of `num_tokens`, the root; `None`: any number."""
        if self.last is not None and num_tokens > self.last:
            return 0
        lengths = self.switches if self.last is None else (*self.switches, self.last)
        # The token behind a switch is read alone, too: all before it have been read in the other way.
        return min((max(length - num_tokens, 0) for length in lengths if num_tokens <= length + 1), default=None)

    def fit(self, plan: TreePlan, ids: Tensor) -> TreePlan:
        """As much of `plan` as may be read with the last of the tokens `ids (B, T)`."""
        room = self.room(ids.shape[1])
        return plan if room is None else plan.within(room)

    def forbid_drafting(self, ids: Tensor) -> bool:
        """Whether from the last of the tokens `ids (B, T)` on each must be read alone."""
        return self.last is not None and ids.shape[1] > self.last

    def are_reached(self, transcript: Transcript) -> bool:
        """Whether one of the limits lies in what may still be read."""
        num_tokens, max_length = transcript.input_ids.shape[1], transcript.max_length
        if self.last is not None and max_length > self.last:
            return True
        return any(num_tokens <= length + 1 and max_length > length for length in self.switches)

    def warn(self, target: PreTrainedModel, transcript: Transcript) -> None:
        """Says once, for each target, where nothing is drafted, if the text may become so long."""
        if self.last is not None and transcript.max_length > self.last:
            warn_once(
                f"{type(target).__name__} has other RoPE factors for every length beyond `max_position_embeddings` "
                f"({target.config.get_text_config(decoder=True).max_position_embeddings} tokens): there generation is "
                "plain, without draft tokens."
            )


def check_reread(target: PreTrainedModel, transcript: Transcript) -> None:
    """
    Refuses targets that drop their cache at a switch and then do not read the whole text, as in old transformers.

    Raises:
        NotImplementedError: Says up to which length texts can be.
    """
    columns = getattr(target.config, "original_max_position_embeddings", None)
    # The last token is not read.
    if columns is None or transcript.num_slots > columns or transcript.max_slots - 1 <= columns:
        return
    ids = transcript.input_ids.new_zeros(1, columns + 1)
    inputs = target.prepare_inputs_for_generation(
        ids, past_key_values=DynamicCache(config=target.config), attention_mask=ids + 1, next_sequence_length=1
    )
    if inputs.get("past_key_values") is None and inputs["input_ids"].shape[1] == 1:
        raise NotImplementedError(
            f"{type(target).__name__} in this version of transformers forgets the text before its token "
            f"{columns + 1}, so that texts of at most {columns + 1} tokens can be drafted for, got room for "
            f"{transcript.max_slots}. Update transformers, or pass a smaller `max_new_tokens`."
        )


def check_omitted(target: PreTrainedModel, transcript: Transcript) -> None:
    """
    Refuses texts of which a part is only in the cache, where the target may have to read the whole text again.

    Raises:
        NotImplementedError: Says up to which length it need not.
    """
    limits = ReadingLimits.of(target, {})
    first = min((*limits.switches, *([] if limits.last is None else [limits.last])), default=transcript.max_slots)
    if transcript.num_omitted > 0 and transcript.max_slots > first:
        raise NotImplementedError(
            f"{type(target).__name__} may read texts of over {first} tokens otherwise, so `input_ids` must be the "
            f"whole text, got a `past_key_values` of {transcript.num_omitted} more tokens and room for "
            f"{transcript.max_slots}."
        )


def rope_lengths(config: PreTrainedConfig) -> tuple[set[int], set[int]]:
    """The numbers of tokens up to which the first factors hold: of "longrope", and of "dynamic" scaling."""
    rope = getattr(config, "rope_parameters", None) or {}
    longrope, dynamic = set(), set()
    for parameters in (rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))):
        rope_type = parameters.get("rope_type") or ""
        if rope_type == "longrope":
            longrope.add(parameters["original_max_position_embeddings"])
        elif "dynamic" in rope_type:
            dynamic.add(config.max_position_embeddings)
    return longrope, dynamic


def least_padding(model_kwargs: dict) -> int:
    """Columns before the first token of the sequence that has least of them."""
    positions = model_kwargs.get("position_ids")
    return 0 if positions is None else positions.shape[-1] - 1 - int(positions[..., -1].max())
