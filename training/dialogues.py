"""A conversation that the target answers anew: what has been said so far, and which answer is wanted next.

Every turn of the assistant is asked for again, in order, and what the target says becomes the context of the turns
after it. Two kinds of turns stay as the source has them: a turn that a `tool` message follows, because the result
belongs to that very call, and with `last_turn_only` everything before the last answer. A conversation that ends with
another role gets an answer there, so a plain list of prompts is a dataset too.
"""

from dataclasses import dataclass, field

from .conversations import Conversation

# Why a conversation ended before its source did.
CUT_ANSWER = "the answer was cut by --max-new-tokens"


@dataclass(frozen=True)
class Answer:
    """
    One answer of the target.

    Args:
        message (`dict`): The turn, with `role` and `content`, and from an endpoint also `reasoning_content` and
            `tool_calls`.
        is_cut (`bool`): The answer has `max_new_tokens` tokens and no end.
        num_tokens (`int`): Generated tokens, the end-of-turn token included.
        prompt_ids (`list[int]`): What the target saw; empty from an endpoint.
        token_ids (`list[int]`): What it generated, the end-of-turn token included; empty from an endpoint.
    """

    message: dict
    is_cut: bool
    num_tokens: int
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class Dialogue:
    """
    One conversation on its way through the target.

    Args:
        number (`int`): Row of the dataset, from 0.
        source (`Conversation`): What the dataset has; the first `num_given` messages stay.
        last_turn_only (`bool`, *optional*, defaults to `False`): Keep all turns but the last answer.
    """

    def __init__(self, number: int, source: Conversation, last_turn_only: bool = False):
        self.number = number
        self.source = source.messages
        self.tools = source.tools
        self.said: list[dict] = []
        self.answers: list[Answer] = []
        self.ended_because: str | None = None
        self._wanted = answers_wanted(source, last_turn_only)
        self._num_finished = 0

    @property
    def num_wanted(self) -> int:
        """Answers that are still to be given."""
        return len(self._wanted)

    @property
    def is_cut(self) -> bool:
        return bool(self.answers) and self.answers[-1].is_cut

    @property
    def messages(self) -> list[dict]:
        """The conversation up to the last answer of the target; empty where it gave none."""
        return self.said[: self._num_finished]

    def advance(self) -> bool:
        """Whether an answer is wanted. **Effects**: `said` becomes everything that comes before it."""
        if not self._wanted:
            return False
        self.said += self.source[len(self.said) : self._wanted[0]]
        return True

    def take(self, answer: Answer, drop_cut: bool = False) -> None:
        """
        Adds the answer that was wanted. A cut one ends the conversation: what follows was no reply to it.

        Args:
            answer ([`Answer`]): The next turn.
            drop_cut (`bool`, *optional*, defaults to `False`): Leave a cut answer out.
        """
        if answer.is_cut and drop_cut:
            self.end(CUT_ANSWER)
            return
        self.said.append(answer.message)
        self.answers.append(answer)
        self._num_finished = len(self.said)
        del self._wanted[0]
        if answer.is_cut and self._wanted:
            self.end(CUT_ANSWER)

    def end(self, reason: str) -> None:
        """Wants no further answer; the reason is reported."""
        self.ended_because = reason
        self._wanted.clear()


def answers_wanted(source: Conversation, last_turn_only: bool = False) -> list[int]:
    """Positions of the messages that the target fills; the position after the end where nobody has answered."""
    roles = [message["role"] for message in source.messages]
    wanted = [index for index in source.answers() if roles[index + 1 : index + 2] != ["tool"]]
    if roles[-1] != "assistant":
        wanted.append(len(roles))
    return wanted[-1:] if last_turn_only else wanted


def token_rows(answers: list[Answer]) -> list[tuple[list[int], list[int]]]:
    """
    The answers as the target saw and said them, `(input_ids, loss_mask)`, with 1 where the target produced the token.

    One row holds all answers as long as each prompt continues the tokens before it. A template that rewrites earlier
    turns (that leaves out their reasoning, for example) begins a new row, so that no answer ever stands in another
    context than the one it was given in.
    """
    rows = []
    for answer in answers:
        input_ids = answer.prompt_ids + answer.token_ids
        loss_mask = [0] * len(answer.prompt_ids) + [1] * len(answer.token_ids)
        if rows and answer.prompt_ids[: len(rows[-1][0])] == rows[-1][0]:
            before = rows.pop()[1]
            loss_mask[: len(before)] = before
        rows.append((input_ids, loss_mask))
    return rows
