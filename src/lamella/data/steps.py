"""Which rows a step trains, and which rank computes which of them: a function of lengths and costs, no token is read.

Step s trains rows s * G <= r < (s + 1) * G of the run (G rows a step over all ranks), whoever computes them. With a
window of W steps, the rows of W steps in turn are sorted by cost and dealt to those steps G by G, the steps shuffled:
then the rows of a step cost about the same, which is what balances ranks that have one row each.
"""

from functools import lru_cache

import numpy as np

from lamella.config import DataConfig
from lamella.data.deal import deal
from lamella.data.plan import Plans, RowCost
from lamella.data.shuffle import permutation
from lamella.data.store.manifest import Manifest, Prepared
from lamella.errors import UserError


class Steps:
    """The training split's rows, dealt to steps.

    Attributes: plans, names (of the sources), weights (theirs; None: as they come), shares (theirs of the tokens).
    """

    def __init__(
        self,
        config: DataConfig,
        prepared: Prepared,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        window: int = 1,
        cost: RowCost | None = None,
        balanced: bool = True,
    ):
        """`window` needs a `cost`; without it, or not `balanced`, rows are dealt in their order.

        Raises UserError: a source with a weight and no document.
        """
        self.names = list(prepared.sources)
        self.weights = _weights(config, prepared.manifest)
        lengths = [splits["train"].lengths for splits in prepared.sources.values()]
        self.plans = Plans(lengths, self.weights, sequence_length, seed)
        self.shares = self.plans.shares
        self._per_step, self._seed = global_batch_size, seed
        self._window, self._cost, self._balanced = window, cost, balanced
        self.step_rows = lru_cache(8)(self._step_rows)

    def deal(self, step: int, ranks: int) -> list[list[int]]:
        """The rows of a step that each of `ranks` ranks computes, in this order."""
        if self._cost is None or not self._balanced:
            return np.arange(self._per_step).reshape(ranks, -1).tolist()
        return deal(self.costs(step), ranks).tolist()

    def costs(self, step: int) -> np.ndarray:
        """What each row of a step costs, int64 [global_batch_size]."""
        return self._costs(self.step_rows(step))

    def target_count(self, step: int) -> int:
        """How many tokens the whole step predicts, over all ranks, from the plan alone."""
        found = (self.plans.find(row) for row in self.step_rows(step).tolist())
        return sum(int(plan.targets[row + 1] - plan.targets[row]) for plan, row in found)

    def source_counts(self, step: int) -> list[int]:
        """The same by source."""
        counts = np.zeros(len(self.names), np.int64)
        for row in self.step_rows(step).tolist():
            plan, place = self.plans.find(row)
            some = slice(int(plan.begins[place]), int(plan.begins[place + 1]))
            np.add.at(counts, plan.source[some], plan.length[some])
        return counts.tolist()

    def _step_rows(self, step: int) -> np.ndarray:
        """The run's numbers of a step's rows, int64 [global_batch_size]."""
        block, place = divmod(step, self._window)
        size = self._window * self._per_step
        rows = np.arange(block * size, (block + 1) * size)
        if self._window == 1:
            return rows
        group = permutation(self._window, self._seed, block, 3)[place]
        order = self._window_order(block).reshape(self._window, -1)
        return rows[np.sort(order[group])]

    @lru_cache(2)  # noqa: B019 (one of these lives as long as its run)
    def _window_order(self, block: int) -> np.ndarray:
        size = self._window * self._per_step
        return np.argsort(self._costs(np.arange(block * size, (block + 1) * size)), kind="stable")

    def _costs(self, rows: np.ndarray) -> np.ndarray:
        """What some rows of the run cost, int64."""
        assert self._cost is not None, "a window needs a cost"
        found = []
        while len(rows):
            segment = self.plans.segment_of(int(rows[0]))
            here = rows[rows < self.plans.begin(segment + 1)]
            found.append(self._plan_costs(segment)[here - self.plans.begin(segment)])
            rows = rows[len(here) :]
        return np.concatenate(found)

    @lru_cache(32)  # noqa: B019 (a window may span many epochs of little data)
    def _plan_costs(self, segment: int) -> np.ndarray:
        assert self._cost is not None
        return self.plans.plan(segment).costs(self._cost)


def _weights(config: DataConfig, manifest: Manifest) -> list[float] | None:
    """By stored source; one of the configuration that lies in several files shares its weight by their tokens."""
    given = [source.weight for source in config.sources]
    if None in given:
        return None
    for name, entry in manifest.sources.items():
        if not entry.splits["train"].documents:
            raise UserError(f"{config.path}: source {name} has a weight and no training document; leave it out")
    origins = [(entry.origin, entry.splits["train"].tokens) for entry in manifest.sources.values()]
    whole = {origin: sum(tokens for other, tokens in origins if other == origin) for origin, _ in origins}
    return [given[origin] * tokens / whole[origin] for origin, tokens in origins]  # type: ignore[operator]
