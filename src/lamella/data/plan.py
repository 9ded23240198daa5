"""The plan of a segment: which pieces of which documents lie in which row. A pure function of (lengths, weights, T,
seed, segment).

The segment's documents are packed in their order; then its rows are shuffled, so that the pieces of one long document
and the nearly empty rows of the end lie scattered.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import RLock

import numpy as np

from lamella.data.mixture import Mixture
from lamella.data.pack import count_up, pack
from lamella.data.shuffle import permutation

KEPT, SMALL = 2, 1 << 21  # plans in memory: this segment's and the next one's; more of them up to so many pieces
LEAST = 4096  # rows of a segment of weighted sources, about: its last ones are not full
RowCost = Callable[[np.ndarray], np.ndarray]  # what documents of these lengths cost, int64 [n] to int64 [n]


@dataclass(frozen=True)
class Plan:
    """The rows of a segment. Row r holds the pieces begins[r] <= p < begins[r + 1], in this order.

    begins int64 [rows + 1]; source int16, document int64, offset int64 and length int32 [pieces]: tokens
    offset .. offset + length of a stored document.
    """

    sequence_length: int
    begins: np.ndarray
    source: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.begins) - 1

    @cached_property
    def targets(self) -> np.ndarray:
        """How many slots all rows before r fill, int64 [rows + 1]."""
        return np.concatenate([[0], np.cumsum(self.length, dtype=np.int64)])[self.begins]

    def pieces(self, row: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields (source, document, offset, length) for each piece of a row."""
        some = slice(int(self.begins[row]), int(self.begins[row + 1]))
        fields = (self.source, self.document, self.offset, self.length)
        return zip(*(field[some].tolist() for field in fields), strict=True)

    def costs(self, cost: RowCost) -> np.ndarray:
        """What each row costs, its padding as one more document, int64 [rows]."""
        padding = self.sequence_length - np.diff(self.targets)
        return np.add.reduceat(cost(self.length), self.begins[:-1]) + cost(padding)


def plan_rows(
    source: np.ndarray, document: np.ndarray, lengths: Sequence[np.ndarray], sequence_length: int, *key: int
) -> Plan:
    """Packs documents in their order into rows, and shuffles the rows by `key`. `lengths` by source."""
    stored = np.empty(len(document), np.int64)
    for number, some in enumerate(lengths):
        here = source == number
        stored[here] = some[document[here]]
    packed = pack(stored, sequence_length)
    rows = permutation(len(packed.sizes), *key)
    first = np.cumsum(packed.sizes) - packed.sizes
    pieces = np.repeat(first[rows], packed.sizes[rows]) + count_up(packed.sizes[rows])
    item = packed.item[pieces]
    return Plan(
        sequence_length,
        begins=np.concatenate([[0], np.cumsum(packed.sizes[rows])]),
        source=source[item],
        document=document[item],
        offset=packed.offset[pieces],
        length=packed.length[pieces].astype(np.int32),
    )


def plan_once(lengths: Sequence[np.ndarray], sequence_length: int) -> Plan:
    """Every document once, in a fixed order: what is evaluated."""
    source, document = Mixture(lengths, None, seed=0).segment(0)
    return plan_rows(source, document, lengths, sequence_length, 0, 0, 1)


class Plans:
    """The rows of a run by their number: those of segment 0, then of segment 1, and so on.

    How many rows a segment has is known only from its plan: the first look far ahead plans all segments before it.
    """

    def __init__(self, lengths: Sequence[np.ndarray], weights: Sequence[float] | None, sequence_length: int, seed: int):
        self._mixture = Mixture(lengths, weights, seed, LEAST * sequence_length)
        self._lengths, self._sequence_length, self._seed = lengths, sequence_length, seed
        self._plans: dict[int, Plan] = {}
        self._lock = RLock()  # rows are read ahead by a thread
        self._begins = [0]  # the first row of each segment known so far, and of the one behind

    @property
    def shares(self) -> list[float]:
        """Each source's of the tokens."""
        return [float(share) for share in self._mixture.shares]

    def find(self, row: int) -> tuple[Plan, int]:
        """The plan that holds a row of the run, and the row's place in it."""
        segment = self.segment_of(row)
        return self.plan(segment), row - self._begins[segment]

    def segment_of(self, row: int) -> int:
        with self._lock:
            while self._begins[-1] <= row:
                self._begins.append(self._begins[-1] + self.plan(len(self._begins) - 1).num_rows)
            return bisect_right(self._begins, row) - 1

    def begin(self, segment: int) -> int:
        """The number of a segment's first row."""
        while len(self._begins) <= segment:
            self.segment_of(self._begins[-1])
        return self._begins[segment]

    def plan(self, segment: int) -> Plan:
        with self._lock:
            if segment not in self._plans:
                while len(self._plans) >= KEPT and sum(len(p.length) for p in self._plans.values()) > SMALL:
                    del self._plans[min(self._plans)]
                order = self._mixture.segment(segment)
                self._plans[segment] = plan_rows(*order, self._lengths, self._sequence_length, self._seed, segment, 1)
            return self._plans[segment]
