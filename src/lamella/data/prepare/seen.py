"""Which documents have come before: 16 bytes each, in sorted runs that are merged when a later one has grown as large.

Looking n digests up costs a binary search in each of about log2(documents / n) runs.
"""

import os
from pathlib import Path

import numpy as np

WIDTH = 16  # bytes of a digest
Run = tuple[np.ndarray, np.ndarray]  # upper and lower halves, uint64 [n], sorted by the upper


class Seen:
    """Digests in their order, of which those that are kept in `file` outlive a kill."""

    def __init__(self, file: Path, count: int = 0):
        """Goes on behind the first `count` digests of the file."""
        self._file = file.open("r+b" if count else "w+b")
        known = np.frombuffer(self._file.read(count * WIDTH), ">u8").reshape(-1, 2)
        self._file.truncate(count * WIDTH)
        self._file.seek(0, 2)
        self.count = count
        self._runs: list[Run] = [_sorted(known)] if count else []

    def add(self, digests: bytes) -> np.ndarray:
        """bool [n]: which of the n digests have come before, in this call or an earlier one."""
        self._file.write(digests)
        found = np.frombuffer(digests, ">u8").reshape(-1, 2)
        self.count += len(found)
        old = np.zeros(len(found), bool)
        for run in self._runs:
            old |= _holds(run, found)
        here: set[bytes] = set()
        for number in np.flatnonzero(~old).tolist():
            digest = digests[number * WIDTH : (number + 1) * WIDTH]
            old[number] = digest in here
            here.add(digest)
        if not old.all():
            self._push(_sorted(found[~old]))
        return old

    def sync(self) -> int:
        """Puts the digests on the disk; returns their number."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.count

    def close(self) -> None:
        self._file.close()

    def _push(self, run: Run) -> None:
        while self._runs and len(self._runs[-1][0]) <= len(run[0]):
            run = _merged(self._runs.pop(), run)
        self._runs.append(run)


def _sorted(digests: np.ndarray) -> Run:
    """Of uint64 [n, 2], big-endian."""
    high, low = (digests[:, half].astype(np.uint64) for half in (0, 1))
    order = np.argsort(high)
    return high[order], low[order]


def _merged(a: Run, b: Run) -> Run:
    places = np.searchsorted(a[0], b[0]) + np.arange(len(b[0]))
    mine = np.ones(len(a[0]) + len(b[0]), bool)
    mine[places] = False
    merged = []
    for old, new in zip(a, b, strict=True):
        half = np.empty(len(mine), np.uint64)
        half[mine], half[places] = old, new
        merged.append(half)
    return merged[0], merged[1]


def _holds(run: Run, digests: np.ndarray) -> np.ndarray:
    high, low = run
    wanted, rest = digests[:, 0].astype(np.uint64), digests[:, 1]
    places = np.searchsorted(high, wanted)
    found = np.zeros(len(wanted), bool)
    open_ = np.arange(len(wanted))
    while len(open_):  # once, but for digests that share their upper half
        open_ = open_[places[open_] < len(high)]
        open_ = open_[high[places[open_]] == wanted[open_]]
        found[open_] = low[places[open_]] == rest[open_]
        open_ = open_[~found[open_]]
        places[open_] += 1
    return found
