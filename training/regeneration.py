"""A dataset with the answers of the target: what a draft has to imitate is what the target says.

The rows are cut into shards, in their order. A shard is answered as a whole and written at once, so an interrupted
run goes on after its last complete shard; process p of n takes the shards p, p + n, ... and waits for nobody. What a
shard holds depends on the data, the target and the arguments only: not on interruptions or the number of processes.

How an answered conversation is written stands in `answered_rows.py`.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset
from tqdm import tqdm

from .answered_rows import RowForm
from .answering import TargetAnswerer
from .dialogues import Answer, Dialogue
from .endpoint import EndpointAnswerer
from .prompt_rows import read_prompts
from .row_shards import RowShards


@dataclass(frozen=True)
class Regeneration:
    """
    A checked request, everything loaded.

    Args:
        rows (`Dataset`): The conversations.
        answerer (`TargetAnswerer` or `EndpointAnswerer`): Gives the answers.
        shards (`RowShards`): Where they go.
        rows_per_shard (`int`): Conversations of a shard.
        form (`RowForm`): How they are written.
        last_turn_only (`bool`): Keep all turns but the last answer.
        process (`int`): Number of this process.
        num_processes (`int`): How many share the shards.
    """

    rows: Dataset
    answerer: TargetAnswerer | EndpointAnswerer
    shards: RowShards
    rows_per_shard: int
    form: RowForm
    last_turn_only: bool
    process: int
    num_processes: int

    def row_numbers(self, shard: int) -> range:
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, len(self.rows)))

    def missing_shards(self) -> list[int]:
        """Shards that this process still has to write."""
        own = range(self.process, self.shards.num_shards, self.num_processes)
        return [shard for shard in own if not self.shards.is_complete(shard)]


class Progress:
    """A bar over the answers of this process, with the tokens per second that the target generates."""

    def __init__(self, is_shown: bool):
        self._bar = tqdm(desc="Answering", unit=" answers", total=0, disable=not is_shown)
        # A disabled bar has neither a count nor a total.
        self._bar.n = self._bar.total = 0
        self._expected: deque[int] = deque()
        self._start = time.monotonic()
        self._num_settled = 0
        self._num_tokens = 0

    def expect(self, num_answers: int) -> None:
        """One more shard is asked for."""
        self._expected.append(num_answers)
        self._bar.total += num_answers
        self._bar.refresh()

    def report(self, answer: Answer) -> None:
        self._num_tokens += answer.num_tokens
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{self._num_tokens / seconds:.0f} tokens/s", refresh=False)
        self._bar.update()

    def settle(self) -> None:
        """The first of the expected shards is written; answers that it could not get count as done."""
        self._num_settled += self._expected.popleft()
        self._bar.n = self._num_settled
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def regenerate(job: Regeneration) -> None:
    """Answers and writes every shard of this process that is not complete yet."""
    progress = Progress(is_shown=job.process == 0)
    shards = job.missing_shards()
    answered = job.answerer.answer(ask(job, shards, progress), progress.report)
    try:
        for shard, dialogues in zip(shards, answered, strict=True):
            job.shards.write(shard, *write_out(job, dialogues))
            progress.settle()
    finally:
        progress.close()


def ask(job: Regeneration, shards: list[int], progress: Progress) -> Iterator[list[Dialogue]]:
    """The dialogues of each shard, read when it is its turn."""
    for shard in shards:
        dialogues = []
        for number in job.row_numbers(shard):
            conversation = read_prompts(job.rows[number], number + 1)
            dialogues.append(Dialogue(number, conversation, job.last_turn_only))
        progress.expect(sum(dialogue.num_wanted for dialogue in dialogues))
        yield dialogues


def write_out(job: Regeneration, dialogues: list[Dialogue]) -> tuple[list[dict], dict]:
    """Rows of a shard, and its record: what they are and what is missing among them, with the reasons."""
    rows, left_out, ended_early = [], Counter(), Counter()
    answers = [answer for dialogue in dialogues for answer in dialogue.answers]
    unreproduced = []
    for dialogue in dialogues:
        if dialogue.ended_because is not None:
            (ended_early if dialogue.answers else left_out)[dialogue.ended_because] += 1
        if dialogue.answers:
            rows += job.form.rows(dialogue, job.rows[dialogue.number])
            if job.form.output_format == "messages":
                unreproduced.append(job.answerer.reproduces(dialogue) is False)
    record = {
        "num_conversations": len(dialogues),
        "num_answers": len(answers),
        "num_answer_tokens": sum(answer.num_tokens for answer in answers),
        "num_cut": sum(answer.is_cut for answer in answers),
        "num_unreproduced": sum(unreproduced),
        "left_out": dict(sorted(left_out.items())),
        "ended_early": dict(sorted(ended_early.items())),
    }
    return rows, record


def total_record(records: list[dict]) -> dict:
    """The sum of the records of all shards."""
    total = {name: sum(record[name] for record in records) for name in records[0] if name.startswith("num_")}
    for name in ("left_out", "ended_early"):
        counts = Counter()
        for record in records:
            counts.update(record[name])
        total[name] = dict(sorted(counts.items()))
    return total
