"""The pack plan: which pieces of which documents lie in which row of an epoch. Lengths in, small arrays out.

A document of L stored tokens takes L slots of a row of T. One longer than T is first cut: its L // T full pieces are
rows by themselves, the rest is packed like a short document. So no document that fits a row is ever cut, and none is
dropped.

The rests are packed by best fit decreasing in windows: 256 documents at a time, the longest first, each into the open
row with the least room that still holds it. After a window at most 256 rows stay open for the next one's documents, the
others are closed, the fullest first. Then all rows of the epoch are shuffled, so that the pieces of one long document
and the nearly empty rows of the end lie scattered.

A plan is a pure function of (lengths, T, seed, epoch).
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

WINDOW = 256  # documents sorted together, and rows left open between windows


@dataclass(frozen=True)
class Plan:
    """The rows of one epoch. Row r holds the pieces begins[r] <= p < begins[r + 1], in this order.

    begins int64 [rows + 1]; document int32, offset int64 and length int32 [pieces]: tokens offset .. offset + length of
    a stored document; targets int64 [rows + 1]: how many slots all rows before r fill.
    """

    begins: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    targets: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.begins) - 1

    def pieces(self, row: int) -> Iterator[tuple[int, int, int]]:
        """Yields (document, offset, length) for each piece of a row."""
        some = slice(int(self.begins[row]), int(self.begins[row + 1]))
        return zip(self.document[some].tolist(), self.offset[some].tolist(), self.length[some].tolist(), strict=True)

    def target_count(self, begin: int, end: int) -> int:
        """How many slots the rows begin <= r < end fill."""
        return int(self.targets[end] - self.targets[begin])


def plan_epoch(lengths: np.ndarray, sequence_length: int, seed: int, epoch: int) -> Plan:
    """Packs documents of `lengths` stored tokens (int [documents], each >= 1) into rows of `sequence_length`."""
    order = permutation(len(lengths), seed, epoch, 0)
    shuffled = lengths[order].astype(np.int64)
    full, rest = np.divmod(shuffled, sequence_length)
    short = np.flatnonzero(rest)
    members, sizes = _best_fit(rest[short], sequence_length)
    short = short[members]

    document = np.concatenate([np.repeat(order, full), order[short]])
    offset = np.concatenate([_count_up(full) * sequence_length, full[short] * sequence_length])
    length = np.concatenate([np.full(int(full.sum()), sequence_length), rest[short]])
    sizes = np.concatenate([np.ones(int(full.sum()), np.int64), sizes])

    rows = permutation(len(sizes), seed, epoch, 1)
    first = np.cumsum(sizes) - sizes
    pieces = np.repeat(first[rows], sizes[rows]) + _count_up(sizes[rows])
    begins = np.concatenate([[0], np.cumsum(sizes[rows])])
    filled = np.concatenate([[0], np.cumsum(length[pieces])])
    return Plan(
        begins=begins.astype(np.int64),
        document=document[pieces].astype(np.int32),
        offset=offset[pieces].astype(np.int64),
        length=length[pieces].astype(np.int32),
        targets=filled[begins].astype(np.int64),
    )


def permutation(count: int, *key: int) -> np.ndarray:
    """The order of 0 .. count - 1 by a hash of (key, index), int64.

    Not numpy's generator, whose streams may change between versions: a resumed run must find its rows again.
    """
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _mix(state ^ np.uint64(word))
    return np.argsort(_mix(state ^ np.arange(count, dtype=np.uint64)), kind="stable")


def _best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items into rows of `room` slots; returns the items row by row and the number of items of each row.

    `free` keeps, as bits of one number, for which room an open row exists: the best fit is the lowest bit at or above
    the item's length.
    """
    members, sizes = array("q"), array("q")
    open_rows: dict[int, list[list[int]]] = {}  # by room left
    free = count = 0

    def take(left: int) -> list[int]:
        nonlocal free, count
        rows = open_rows[left]
        row = rows.pop()
        count -= 1
        if not rows:
            free ^= 1 << left
        return row

    def close(row: list[int]) -> None:
        members.extend(row)
        sizes.append(len(row))

    for begin in range(0, len(lengths), WINDOW):
        window = lengths[begin : begin + WINDOW]
        for item in np.argsort(-window, kind="stable").tolist():
            length = int(window[item])
            fitting = free >> length
            left = length + _lowest_bit(fitting) if fitting else room
            row = take(left) if fitting else []
            row.append(begin + item)
            left -= length
            if not left:
                close(row)
                continue
            open_rows.setdefault(left, []).append(row)
            free |= 1 << left
            count += 1
        while count > WINDOW:
            close(take(_lowest_bit(free)))
    while free:
        close(take(_lowest_bit(free)))
    return np.array(members, np.int64), np.array(sizes, np.int64)


def _lowest_bit(number: int) -> int:
    return (number & -number).bit_length() - 1


def _count_up(sizes: np.ndarray) -> np.ndarray:
    """0 .. size - 1 for each size, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)


def _mix(words: np.ndarray) -> np.ndarray:
    """splitmix64's step (Steele, Lea & Flood 2014): one bit in changes half of the bits out."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
