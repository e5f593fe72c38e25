"""Acceptance length: tokens that a round of speculative decoding emits, as a metric of the `evaluate` library.

It is the mean of the lengths l_1 ... l_n of n rounds. Serving engines count the bonus token at the end of a round,
some papers do not; here it is counted unless one says otherwise.
"""

import datasets
import evaluate

_DESCRIPTION = """\
Acceptance length of speculative decoding: the mean number of tokens that a round emits, that is, one forward of the
target. The bonus token, which is the target's own, is counted unless `count_bonus_token=False`. The forward over the
prompt, which emits the first token of a text without any draft, is not a round.
"""

_CITATION = """\
@article{li2025eagle3,
  title={EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test},
  author={Li, Yuhui and Wei, Fangyun and Zhang, Chao and Zhang, Hongyang},
  journal={arXiv preprint arXiv:2503.01840},
  year={2025}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]`):
        For each text the tokens that each of its rounds emitted, bonus token included: `acceptance_lengths` of
        `draft.speculation_stats`, or of a line of the `texts.jsonl` that `scripts/eval_eagle.py` writes.
    average (`str`, *optional*, defaults to `"rounds"`):
        `"rounds"`: every round counts once. `"texts"`: the mean of the texts' means, texts without a round left out.
    count_bonus_token (`bool`, *optional*, defaults to `True`):
        Whether the target's own token at the end of a round is counted.

Returns:
    `dict`: `acceptance_length` (`float`), and what it was taken over: `rounds` (`int`) and `tokens` (`int`, those of
    the rounds, bonus tokens included).

Examples:

    >>> acceptance_length = evaluate.load("metrics/acceptance_length.py")
    >>> acceptance_length.compute(predictions=[[4, 4], [1]])
    {'acceptance_length': 3.0, 'rounds': 3, 'tokens': 9}
    >>> acceptance_length.compute(predictions=[[4, 4], [1]], average="texts", count_bonus_token=False)
    {'acceptance_length': 1.5, 'rounds': 3, 'tokens': 9}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AcceptanceLength(evaluate.Metric):
    """Mean tokens per round."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            reference_urls=["https://arxiv.org/abs/2503.01840"],
        )

    def _compute(self, predictions, average="rounds", count_bonus_token=True):
        if average not in ("rounds", "texts"):
            raise ValueError(f'`average` must be "rounds" or "texts", got {average!r}.')
        texts = [lengths for lengths in predictions if len(lengths) > 0]
        if not texts:
            raise ValueError(f"`predictions` must hold at least 1 round, got {len(predictions)} texts without any.")
        shortest = min(map(min, texts))
        if shortest < 1:
            raise ValueError(f"`predictions` must be tokens of rounds, at least 1 each, got {shortest}.")
        groups = texts if average == "texts" else [[length for lengths in texts for length in lengths]]
        means = [sum(lengths) / len(lengths) for lengths in groups]
        return {
            "acceptance_length": sum(means) / len(means) - (not count_bonus_token),
            "rounds": sum(map(len, texts)),
            "tokens": sum(map(sum, texts)),
        }
