"""Which rank computes which of a step's rows: as many for each, and their costs as equal as can be.

The step's rows are fixed before; dealing them changes who computes what and nothing else. Costs are whole numbers, so
every rank of every machine finds the same deal.
"""

import heapq
from functools import lru_cache
from itertools import combinations

import numpy as np

SWAPS = 40  # at most: each takes tens of microseconds
FEW = 4  # ranks with least, which are looked at first
CLOSE = 2e-3  # of the mean: nothing is gained below
ANEW = 4  # rows a rank, at most, with which two ranks try every way to share theirs out
FOLDED = 8  # rows a rank, at most, with which differencing is tried: beyond, longest first is as good


def deal(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Rows by rank, int64 [ranks, G / ranks], of costs int64 [G]; each rank's dearest rows first.

    The better of two rules begins, `_longest_first` and `_differences`; then rows of the fullest rank are exchanged for
    others' while that lowers the larger of the two.
    """
    each = len(costs) // ranks
    order = np.argsort(-costs, kind="stable")
    dealt = _longest_first(order, costs, ranks)
    if 1 < each <= FOLDED:
        other = _differences(order, costs, ranks)
        if costs[other].sum(axis=1).max() < costs[dealt].sum(axis=1).max():
            dealt = other
    if each > 1:
        dealt = _share_anew(dealt, costs) if each <= ANEW else _exchange(dealt, costs)
    by_cost = np.argsort(-costs[dealt], axis=1, kind="stable")
    return np.take_along_axis(dealt, by_cost, axis=1)


def _longest_first(order: np.ndarray, costs: np.ndarray, ranks: int) -> np.ndarray:
    """The dearest row left goes to the rank with least so far that has a place (Graham 1969)."""
    each = len(costs) // ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for row, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        load, rank = loads[0]
        mine = dealt[rank]
        mine.append(row)
        if len(mine) < each:
            heapq.heapreplace(loads, (load + cost, rank))
        else:
            heapq.heappop(loads)
    return np.array(dealt, np.int64)


def _differences(order: np.ndarray, costs: np.ndarray, ranks: int) -> np.ndarray:
    """Deals of a row each, the dearest rows, the next ones, ...; the two deals whose ranks differ most become one, the
    fullest rank of one with the emptiest of the other (Karmarkar & Karp 1982, Tsai 1992).
    """
    deals = [(costs[rows], rows[:, None]) for rows in order.reshape(-1, ranks)]
    while len(deals) > 1:
        deals.sort(key=lambda deal: int(deal[0].min() - deal[0].max()))
        (a, rows_a), (b, rows_b) = deals[:2]
        down, up = np.argsort(-a, kind="stable"), np.argsort(b, kind="stable")
        deals[:2] = [(a[down] + b[up], np.concatenate([rows_a[down], rows_b[up]], axis=1))]
    return deals[0][1]


def _share_anew(dealt: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The fullest rank and another share out their rows, in the way and with the rank that lower the larger most."""
    each = dealt.shape[1]
    held = costs[dealt].astype(np.float64)  # whole numbers below 2^53: exact
    loads = held.sum(axis=1)
    enough = loads.mean() * (1 + CLOSE)
    ways = _ways(each)
    mine, others = ways[:, :each], ways[:, each:]
    theirs = others @ held.T  # [ways, ranks]
    for _ in range(SWAPS):
        full = int(loads.argmax())
        if loads[full] <= enough:
            break
        apart = np.abs(theirs + (mine @ held[full])[:, None])
        larger = apart.min(axis=0) + loads  # twice it, less the fullest's load
        larger[full] = loads[full]
        other = int(larger.argmin())
        if larger[other] >= loads[full]:
            break
        two = [full, other]
        first = ways[apart[:, other].argmin()] > 0
        for table in (dealt, held):
            rows = table[two].reshape(-1)
            table[full], table[other] = rows[first], rows[~first]
        theirs[:, two] = others @ held[two].T
        loads[two] = held[two].sum(axis=1)
    return dealt


@lru_cache(ANEW)
def _ways(each: int) -> np.ndarray:
    """How two ranks may share out 2 * each rows: 1 to the one, -1 to the other, float64 [ways, 2 * each]."""
    ways = []
    for chosen in combinations(range(1, 2 * each), each - 1):
        ways.append([1.0 if n == 0 or n in chosen else -1.0 for n in range(2 * each)])
    return np.array(ways)


def _exchange(dealt: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The same one row for one."""
    ranks, each = dealt.shape
    held = costs[dealt]
    loads = held.sum(axis=1)
    enough = loads.mean() * (1 + CLOSE)
    for _ in range(SWAPS):
        full = int(loads.argmax())
        if loads[full] <= enough:
            break
        for others in (np.argsort(loads, kind="stable")[:FEW], np.arange(ranks)):
            less = held[full][:, None] - held[others].reshape(1, -1)  # what an exchange takes off the fullest
            after = np.maximum(loads[full] - less, np.repeat(loads[others], each) + less)
            after[less <= 0] = loads[full]
            mine, theirs = divmod(int(after.argmin()), len(others) * each)
            if after[mine, theirs] < loads[full]:
                break
        else:
            break
        place = others[theirs // each], theirs % each
        for table in (dealt, held):
            table[full, mine], table[place] = table[place], table[full, mine]
        loads[full] -= less[mine, theirs]
        loads[place[0]] += less[mine, theirs]
    return dealt
