"""Acceptance rate: the share of the draft tokens that were accepted, as a metric of the `evaluate` library.

A draft token is tried if its parent was emitted; with a_d accepted of t_d tried at depth d, the rate is
sum(a_d) / sum(t_d), and a_d / t_d by depth. In a tree one token is accepted of all that continue the same parent, and
they count as one trial. Of *all* drafted tokens the share is another number, and smaller; both are told.
"""

import datasets
import evaluate

_DESCRIPTION = """\
Acceptance rate of speculative decoding: the share of the tried draft tokens that were accepted, together and by depth.
Tried is what was drafted after a token that was emitted: the tokens behind a rejected one were never in question, and
the tokens of a tree that continue the same parent are one trial.
"""

_CITATION = """\
@inproceedings{leviathan2023fast,
  title={Fast Inference from Transformers via Speculative Decoding},
  author={Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  booktitle={International Conference on Machine Learning},
  year={2023}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]`):
        For each text, or for many together, the accepted draft tokens of each depth: `accepted_by_depth` of
        `draft.speculation_stats`, or of the `results.json` that `scripts/eval_eagle.py` writes.
    references (`list[list[int]]`):
        As many tried ones: `drafted_by_depth` of the same.
    drafted_nodes (`int`, *optional*):
        Draft tokens that the target has read in all, accepted or not: the sum of `drafted_nodes` of the statistics.

Returns:
    `dict`: `acceptance_rate` (`float`), `acceptance_rate_by_depth` (`list[float]`, as deep as anything was tried),
    `accepted` and `tried` (`int`), and, where `drafted_nodes` is given, `accepted_per_drafted_node` (`float`).

Examples:

    >>> acceptance_rate = evaluate.load("metrics/acceptance_rate.py")
    >>> acceptance_rate.compute(predictions=[[3, 1], [1]], references=[[4, 3], [1]], drafted_nodes=20)
    {'acceptance_rate': 0.625, 'acceptance_rate_by_depth': [0.8, 0.3333333333333333], 'accepted': 5, 'tried': 8, \
'accepted_per_drafted_node': 0.25}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AcceptanceRate(evaluate.Metric):
    """Share of the tried draft tokens that were accepted."""

    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": counts, "references": counts}),
            reference_urls=["https://arxiv.org/abs/2211.17192"],
        )

    def _compute(self, predictions, references, drafted_nodes=None):
        for number, (accepted, tried) in enumerate(zip(predictions, references, strict=True)):
            check_counts(number, list(accepted), list(tried))
        accepted, tried = sum_by_depth(predictions), sum_by_depth(references)
        if sum(tried) == 0:
            raise ValueError("`references` must hold at least 1 tried draft token, got none.")
        if drafted_nodes is not None and drafted_nodes < sum(tried):
            raise ValueError(f"`drafted_nodes` must be at least the tried ones ({sum(tried)}), got {drafted_nodes}.")
        rates = {
            "acceptance_rate": sum(accepted) / sum(tried),
            "acceptance_rate_by_depth": [hits / count for hits, count in zip(accepted, tried, strict=True) if count],
            "accepted": sum(accepted),
            "tried": sum(tried),
        }
        return rates if drafted_nodes is None else rates | {"accepted_per_drafted_node": sum(accepted) / drafted_nodes}


def check_counts(number: int, accepted: list[int], tried: list[int]) -> None:
    """Requires counts by depth of one text that can be."""
    if len(accepted) != len(tried):
        raise ValueError(
            f"`predictions` must have as many depths as `references`, got {len(accepted)} and {len(tried)} for text "
            f"{number}."
        )
    if not all(0 <= hits <= count for hits, count in zip(accepted, tried, strict=True)):
        raise ValueError(
            f"`predictions` must be from 0 to `references` at each depth, got {accepted} and {tried} for text "
            f"{number}."
        )


def sum_by_depth(counts: list[list[int]]) -> list[int]:
    """Column sums of rows that may differ in length."""
    return [sum(row[depth] for row in counts if depth < len(row)) for depth in range(max(map(len, counts), default=0))]
