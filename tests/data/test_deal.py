"""Every row once, as many for each rank, and costs as near to equal as a search finds."""

from itertools import combinations

import numpy as np
import pytest

from lamella.data.deal import CLOSE, deal
from lamella.data.plan import Plans


def over_mean(costs: np.ndarray, dealt: np.ndarray) -> float:
    loads = costs[dealt].sum(axis=1)
    return loads.max() / loads.mean()


def step_costs(rows: int, step: int) -> np.ndarray:
    """Squared lengths of the documents in 8,192 slots, web-like lengths."""
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.3, 1.2, 60_000)).astype(np.int32)
    costs = Plans([lengths], None, 8192, 0).plan(0).costs(lambda n: n.astype(np.int64) ** 2)
    return costs[step * rows : (step + 1) * rows]


@pytest.mark.parametrize(("ranks", "each"), [(1, 4), (4, 1), (8, 4), (64, 8)])
def test_a_deal_is_fair(ranks, each):
    costs = step_costs(ranks * each, 1)
    dealt = deal(costs, ranks)
    assert dealt.shape == (ranks, each) and sorted(dealt.ravel()) == list(range(ranks * each))
    assert (np.diff(costs[dealt], axis=1) <= 0).all()
    assert over_mean(costs, dealt) <= over_mean(costs, np.arange(ranks * each).reshape(ranks, each))
    assert (deal(costs.copy(), ranks) == dealt).all()


def test_exchanges_find_what_is_equal():
    """Longest first alone gives 8 + 8 + 7 and 9 + 7 + 6 or worse; 9 + 8 + 6 and 8 + 8 + 7 is there."""
    costs = np.array([9, 8, 8, 8, 7, 6])
    assert over_mean(costs, deal(costs, 2)) == 1


def test_near_the_best_of_a_search():
    rng = np.random.default_rng(1)
    for step in range(3):
        costs = step_costs(32, step)
        mine = over_mean(costs, deal(costs, 8))
        best = mine
        for _ in range(20):
            dealt = rng.permutation(32).reshape(8, 4)
            for _ in range(300):  # exchanges two rows where that lowers the larger of two loads
                a, b, i, j = *rng.choice(8, 2, replace=False), *rng.integers(4, size=2)
                other = dealt.copy()
                other[a, i], other[b, j] = dealt[b, j], dealt[a, i]
                if costs[other[[a, b]]].sum(1).max() < costs[dealt[[a, b]]].sum(1).max():
                    dealt = other
            best = min(best, over_mean(costs, dealt))
        assert mine <= 1.01 * best


@pytest.mark.parametrize("each", [2, 3, 4])
def test_two_ranks_share_as_well_as_can_be(each):
    rng = np.random.default_rng(each)
    for _ in range(20):
        costs = rng.integers(1, 1000, 2 * each)
        best = min(
            max(costs[list(w)].sum(), costs.sum() - costs[list(w)].sum()) for w in combinations(range(2 * each), each)
        )
        assert costs[deal(costs, 2)].sum(axis=1).max() <= best * (1 + CLOSE)


def test_equal_costs_stay_in_their_order():
    assert deal(np.full(8, 5), 4).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
