"""The cells of `pairwise`: a pair that never meets is a test that nobody runs."""

from itertools import combinations, product
from math import prod

import pytest
from pairwise import pairwise


@pytest.mark.parametrize("sizes", [(8, 9, 6), (2, 2, 8, 6), (5, 3), (2, 3, 2, 4, 2), (1, 4, 4)], ids=str)
def test_any_two_values_of_different_axes_meet_in_few_cells(sizes):
    axes = [[f"{axis}-{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    cells = pairwise(*axes)
    for one, other in combinations(range(len(axes)), 2):
        assert {(cell[one], cell[other]) for cell in cells} == set(product(axes[one], axes[other]))
    assert len(set(cells)) == len(cells) <= 1.25 * prod(sorted(sizes)[-2:])
    assert pairwise(*map(iter, axes)) == cells
