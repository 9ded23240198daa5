"""Documents into rows: lengths in, pieces out.

A document of L stored tokens takes L slots of a row of T. One longer than T is first cut: its L // T full pieces are
rows by themselves, the rest is packed like a short document. So no document that fits a row is ever cut, and none is
dropped.

The rests are packed by best fit decreasing in windows: 1,024 documents at a time, the longest first, each into the
open row with the least room that still holds it. After a window at most 1,024 rows stay open for the next one's
documents, the others are closed, the fullest first.
"""

from dataclasses import dataclass

import numpy as np

WINDOW = 1024  # documents sorted together, and rows left open between windows


@dataclass(frozen=True)
class Packed:
    """Row r holds `sizes[r]` pieces, one behind the other: item int64, offset int64 and length int64 [pieces]."""

    sizes: np.ndarray
    item: np.ndarray
    offset: np.ndarray
    length: np.ndarray


def pack(lengths: np.ndarray, sequence_length: int) -> Packed:
    """Packs documents of `lengths` stored tokens (int [documents], each >= 1), as they come, into rows."""
    full, rest = np.divmod(lengths.astype(np.int64), sequence_length)
    short = np.flatnonzero(rest)
    members, sizes = _best_fit(rest[short], sequence_length)
    short = short[members]
    total = int(full.sum())
    return Packed(
        sizes=np.concatenate([np.ones(total, np.int64), sizes]),
        item=np.concatenate([np.repeat(np.arange(len(lengths)), full), short]),
        offset=np.concatenate([count_up(full) * sequence_length, full[short] * sequence_length]),
        length=np.concatenate([np.full(total, sequence_length), rest[short]]),
    )


def count_up(sizes: np.ndarray) -> np.ndarray:
    """0 .. size - 1 for each size, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)


def _best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items into rows of `room` slots; returns the items row by row and the number of items of each row."""
    rows, items = _OpenRows(room), [np.empty(0, np.int64)]
    for begin in range(0, len(lengths), WINDOW):
        window = lengths[begin : begin + WINDOW]
        order = np.argsort(-window, kind="stable")
        items.append(order + begin)
        rows.place(window[order].tolist())
        rows.close(WINDOW if begin + WINDOW < len(lengths) else 0)
    place = np.empty(rows.count, np.int64)
    place[rows.closed] = np.arange(rows.count)
    row = place[np.array(rows.taken, np.int64)]
    return np.concatenate(items)[np.argsort(row, kind="stable")], np.bincount(row, minlength=rows.count)


class _OpenRows:
    """Rows, numbered as they are opened, by the room they have left.

    `words` keeps, a bit each, for which room there is a row, 64 to a number, and `some` which words are not 0: the best
    fit is the lowest bit at or above an item's length. `taken` is the row of each item, `closed` the closed rows.
    """

    def __init__(self, room: int):
        self.room = room
        self.rows: list[list[int]] = [[] for _ in range(room)]
        self.words = [0] * (room // 64 + 1)
        self.some = self.count = 0
        self.taken: list[int] = []
        self.closed: list[int] = []

    def place(self, lengths: list[int]) -> None:
        """Each item, as they come, into the best fit; 1 <= length < room. All in one loop: calls would double it."""
        rows, words, taken = self.rows, self.words, self.taken
        some = self.some
        for length in lengths:
            word = length >> 6
            left = 0
            if bits := words[word] >> (length & 63):
                left = length + (bits & -bits).bit_length() - 1
            elif later := some >> (word + 1):
                word += (later & -later).bit_length()
                bits = words[word]
                left = (word << 6) + (bits & -bits).bit_length() - 1
            if left:
                same = rows[left]
                row = same.pop()
                if not same:
                    word = left >> 6
                    words[word] ^= 1 << (left & 63)
                    if not words[word]:
                        some ^= 1 << word
                left -= length
            else:
                row, left = self.count, self.room - length
                self.count += 1
            taken.append(row)
            if not left:
                self.closed.append(row)
                continue
            same = rows[left]
            if not same:
                words[left >> 6] |= 1 << (left & 63)
                some |= 1 << (left >> 6)
            same.append(row)
        self.some = some

    def close(self, kept: int) -> None:
        """Closes the fullest rows until `kept` are open."""
        while (more := self.count - len(self.closed) - kept) > 0:
            word = _lowest_bit(self.some)
            left = (word << 6) + _lowest_bit(self.words[word])
            same = self.rows[left]
            self.closed += same[: -more - 1 : -1]
            del same[-more:]
            if not same:
                self.words[word] ^= 1 << (left & 63)
                if not self.words[word]:
                    self.some ^= 1 << word


def _lowest_bit(number: int) -> int:
    return (number & -number).bit_length() - 1
