"""Which documents come when: every source an endless stream, and the streams merged by their shares of the tokens.

A source's stream is its documents epoch behind epoch, each epoch in an order of its own. The run's documents come in
segments of about as many tokens as all sources hold, of which source i gives its share: segment s holds the documents
that begin at tokens floor(s S share_i) <= p < floor((s + 1) S share_i) of its stream. So each source has its share in
every segment to within a document, no segment depends on another, and without weights a segment is an epoch (or a part
of one, where the documents are many). Within a segment the sources' documents are merged by how far each has come.

All of it is a pure function of (lengths, weights, seed, segment).
"""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import numpy as np

from lamella.data.shuffle import draws

MOST = 1 << 20  # documents of a segment, about: what a plan holds in memory
BUCKETS = 1 << 16  # of an epoch's order, by the hash's upper bits
BLOCK = 1 << 22  # documents looked at together


class Mixture:
    """`segment(n)` gives the documents of segment n. `shares` are the sources' of the tokens; they sum to 1."""

    def __init__(self, lengths: Sequence[np.ndarray], weights: Sequence[float] | None, seed: int, least: int = 1):
        """`lengths`: by source, stored tokens of each document; `weights`: relative, None for as they come. With
        weights a segment has at least `least` tokens. A source without documents has no weight.
        """
        self._streams = [Stream(some, seed, number) for number, some in enumerate(lengths)]
        tokens = [stream.tokens for stream in self._streams]
        parts = [Fraction(w) for w in (tokens if weights is None else weights)]
        self.shares = [part / sum(parts) for part in parts]
        density = sum(s * len(n) / t for s, n, t in zip(self.shares, lengths, tokens, strict=True) if t)
        self._tokens = Fraction(sum(tokens), max(1, ceil(density * sum(tokens) / MOST)))
        if weights is not None:
            self._tokens *= max(1, ceil(least / self._tokens))

    def segment(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source int16 and document int64 [documents] in their order."""
        sources, documents, times = [], [], []
        for source, (stream, share) in enumerate(zip(self._streams, self.shares, strict=True)):
            begin, end = (int(n * self._tokens * share) for n in (number, number + 1))
            if begin == end:
                continue
            found, at = stream.between(begin, end)
            sources.append(np.full(len(found), source, np.int16))
            documents.append(found)
            times.append((at - begin) / (end - begin))
        order = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(sources)[order], np.concatenate(documents)[order]


class Stream:
    """One source's documents without end. Epoch e holds tokens e * tokens .. (e + 1) * tokens of the stream."""

    def __init__(self, lengths: np.ndarray, seed: int, number: int):
        self.tokens = int(lengths.sum(dtype=np.int64))
        self._lengths, self._seed, self._number = lengths, seed, number
        self._ends: dict[int, np.ndarray] = {}  # of the last epoch looked at, by bucket: the token behind it

    def between(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents that begin at begin <= p < end, and where each does, int64."""
        documents, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for epoch in range(begin // self.tokens, -(-end // self.tokens)):
            before = epoch * self.tokens
            some, at = self._of_epoch(epoch, max(begin - before, 0), min(end - before, self.tokens))
            documents.append(some)
            places.append(at + before)
        return np.concatenate(documents), np.concatenate(places)

    def _of_epoch(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorts no more than the buckets that begin to end touch."""
        if epoch not in self._ends:
            self._ends = {epoch: np.cumsum(self._count(epoch))}
        ends = self._ends[epoch]
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        found = [
            (index[here], keys[here])
            for index, keys in self._keys(epoch)
            if len(here := np.flatnonzero((keys >> np.uint64(48) >= first) & (keys >> np.uint64(48) <= last)))
        ]
        index, keys = (np.concatenate(part) for part in zip(*found, strict=True))
        index = index[np.argsort(keys, kind="stable")]
        lengths = self._lengths[index].astype(np.int64)
        at = np.cumsum(lengths) - lengths + (int(ends[first - 1]) if first else 0)
        here = (at >= begin) & (at < end)
        return index[here], at[here]

    def _count(self, epoch: int) -> np.ndarray:
        """The tokens of each bucket."""
        counts = np.zeros(BUCKETS, np.int64)
        for index, keys in self._keys(epoch):
            np.add.at(counts, keys >> np.uint64(48), self._lengths[index])
        return counts

    def _keys(self, epoch: int):
        """Yields the documents' numbers and what orders them, by blocks."""
        for start in range(0, len(self._lengths), BLOCK):
            index = np.arange(start, min(start + BLOCK, len(self._lengths)))
            yield index, draws(index.astype(np.uint64), self._seed, epoch, 2 * self._number)
