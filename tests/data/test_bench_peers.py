"""The peers of tools/bench_data.py do what they are said to do, on cases small enough to work out."""

from itertools import combinations, permutations

import numpy as np
import pytest

from tools.data_peers import Packed, concat_and_chunk, first_fit, lower_bound, next_fit, search


def test_packing_by_hand():
    lengths = np.array([5, 6, 3, 2, 20, 1])  # rows of 8; 20 is two rows and a rest of 4
    assert next_fit(lengths, 8) == Packed(6, 0, 0)  # 5 | 6 | 3 2 | 4 1, and two full ones
    assert first_fit(lengths, 8) == Packed(5, 0, 0)  # 5 3 | 6 2 | 4 1
    assert first_fit(lengths, 8, bins=1) == next_fit(lengths, 8)
    assert concat_and_chunk(lengths, 8) == Packed(4, 1, 5)  # 6 lies in two rows; 37 tokens are 4 rows and 5


def test_next_fit_closes_a_row_for_good():
    assert next_fit(np.array([5, 4, 3, 4]), 8) == Packed(3, 0, 0)  # 5 | 4 3 | 4
    assert first_fit(np.array([5, 4, 3, 4]), 8) == Packed(2, 0, 0)  # 5 3 | 4 4
    assert first_fit(np.array([5, 6, 7, 3, 2]), 8, bins=2) == Packed(4, 0, 0)  # 5 | 6 | 7 | 3 2: 5 was closed


def best_of_all(costs: np.ndarray, ranks: int) -> int:
    each = len(costs) // ranks
    if ranks == 2:
        ways = combinations(range(len(costs)), each)
        return min(max(costs[list(w)].sum(), costs.sum() - costs[list(w)].sum()) for w in ways)
    return min(costs[list(p)].reshape(ranks, each).sum(axis=1).max() for p in permutations(range(len(costs))))


@pytest.mark.parametrize(("ranks", "each"), [(2, 4), (3, 2)])
def test_the_search_finds_the_best(ranks, each):
    rng = np.random.default_rng(0)
    for _ in range(4):
        costs = rng.integers(1, 100, ranks * each) ** 2
        best = best_of_all(costs, ranks)
        found, proved = search(costs, ranks, 0.05, np.arange(ranks * each).reshape(ranks, each))
        assert lower_bound(costs, ranks) <= best == found
        assert not proved or found == lower_bound(costs, ranks)


def test_a_bound_that_is_reached():
    """Four ranks of two rows, five of them dear: some rank has two of these."""
    assert lower_bound(np.array([9, 9, 9, 9, 9, 1, 1, 1]), 4) == 18
    assert lower_bound(np.array([100, 1, 1, 1, 1, 1]), 2) == 102
