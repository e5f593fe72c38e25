"""Cells for `parametrize` where axes are independent of each other: any two values meet, not every three.

Most of a full product repeats what pairs of values show already, and a fault needs one or two of them as a rule.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations, product


def pairwise(*axes: Iterable) -> list[tuple]:
    """
    Cells with one value of each axis, so that any two values of different axes are in a cell together: greedily, the
    same in every process, and about as many as the product of the two longest axes has.
    """
    axes = [list(axis) for axis in axes]
    missing = {pair: None for one, other in combinations(range(len(axes)), 2) for pair in _pairs(axes, one, other)}
    cells, uses = [], Counter()
    while missing:
        cell = dict(next(iter(missing)))
        for axis in sorted(set(range(len(axes))) - set(cell), key=lambda axis: -len(axes[axis])):
            cell[axis] = min(range(len(axes[axis])), key=lambda value: _merit(cell, axis, value, missing, uses))
        for pair in combinations(sorted(cell.items()), 2):
            missing.pop(pair, None)
        uses.update(cell.items())
        cells.append(tuple(values[cell[axis]] for axis, values in enumerate(axes)))
    return cells


def _pairs(axes: list[list], one: int, other: int):
    """All pairs of two axes, each as `((axis, value), (axis, value))`."""
    return product(product([one], range(len(axes[one]))), product([other], range(len(axes[other]))))


def _merit(cell: dict[int, int], axis: int, value: int, missing: dict, uses: Counter) -> tuple[int, int, int]:
    """Least for the value that adds most pairs; of such ones, for the one that was used least."""
    pairs = (tuple(sorted([place, (axis, value)])) for place in cell.items())
    return -sum(pair in missing for pair in pairs), uses[axis, value], value
