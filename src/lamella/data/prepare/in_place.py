"""Megatron data sets used where they lie: links to their tokens, indexes of our own and checksums; no copy.

Their tokens are read twice: for the checksums and to see that all are the tokenizer's, then document by document for
the digests that part the splits and tell copies.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lamella.data.prepare.encode import DIGEST, in_heldout
from lamella.data.prepare.seen import Seen
from lamella.data.sources.megatron import Stored
from lamella.data.store.blocks import BLOCK, Summer
from lamella.data.store.manifest import SPLITS, SourceEntry, SplitEntry
from lamella.data.store.tokens import CHUNK, part, write_index
from lamella.data.tokenizer import Tokenizer
from lamella.errors import UserError

READ = 16 * BLOCK  # bytes
TOGETHER = 4096  # documents


class Linked:
    """One data set in one folder of ours; `write` makes it."""

    def __init__(self, stored: Stored, folder: Path, tokenizer: Tokenizer, heldout: float):
        self._stored, self._folder, self._tokenizer, self._heldout = stored, folder, tokenizer, heldout

    def write(self, origin: int, seen: Seen, drop: bool, progress: Callable[[int, int], None]) -> SourceEntry:
        """Raises UserError: an id that the tokenizer does not have. `progress` takes documents and bytes."""
        stored = self._stored
        self._folder.mkdir(exist_ok=True)
        sums = self._checked_sums(progress)
        held, old, closed, text_bytes = self._documents(seen, drop, progress)
        splits = {}
        for split in SPLITS:
            mine = np.flatnonzero((held == (split == "heldout")) & ~(old & drop))
            prefix = self._folder / split
            for suffix in ("bin", "idx", "sums"):
                part(prefix, suffix).unlink(missing_ok=True)
            part(prefix, "bin").symlink_to(stored.bin)
            part(prefix, "sums").write_bytes(sums)
            offsets = (stored.offsets[mine[begin : begin + CHUNK]] for begin in range(0, len(mine), CHUNK))
            write_index(part(prefix, "idx"), stored.dtype, stored.lengths[mine], offsets)
            splits[split] = SplitEntry(
                documents=len(mine),
                tokens=int(stored.lengths[mine].sum(dtype=np.int64)) + (0 if closed else len(mine)),
                text_bytes=text_bytes if split == "heldout" else None,
            )
        skipped = {"empty": stored.empty, "not text": 0}
        return SourceEntry(origin=origin, splits=splits, skipped=skipped, duplicates=int(old.sum()), closed=closed)

    def _checked_sums(self, progress: Callable[[int, int], None]) -> bytes:
        stored, limit = self._stored, self._tokenizer.vocab_size
        summer, sums, place = Summer(), bytearray(), 0
        with stored.bin.open("rb") as file:
            while raw := file.read(READ):
                sums += summer.add(raw)
                ids = np.frombuffer(raw, stored.dtype)
                if int(ids.max()) >= limit or int(ids.min()) < 0:
                    wrong = int(np.flatnonzero((ids >= limit) | (ids < 0))[0])
                    at = place + wrong * stored.dtype.itemsize
                    document = int(np.searchsorted(stored.offsets, at, "right")) - 1
                    raise UserError(
                        f"{stored.bin}: document {document} holds id {ids[wrong]}, the tokenizer knows 0 to "
                        f"{limit - 1}: set tokenizer.model to the one that made it"
                    )
                place += len(raw)
                progress(0, place)
        return bytes(sums + summer.end())

    def _documents(
        self, seen: Seen, drop: bool, progress: Callable[[int, int], None]
    ) -> tuple[np.ndarray, np.ndarray, bool, int]:
        """bool [documents] held out and seen before; whether they end with an eod; bytes of text held out."""
        eod, stored = self._tokenizer.eod, self._stored
        held, old = (np.zeros(len(stored.lengths), bool) for _ in range(2))
        closed, text_bytes, size = False, 0, 0
        begin, digests, texts = 0, [], []
        for number, ids in enumerate(stored.documents(), 1):
            size += ids.nbytes
            if ids[-1] == eod:
                closed, ids = True, ids[:-1]
            digests.append(hashlib.sha256(ids.astype("<i4").data).digest()[:DIGEST])
            if in_heldout(digests[-1], self._heldout):
                held[number - 1] = True
                text = self._tokenizer.decode(ids.tolist()).encode(errors="surrogatepass")
                texts.append((len(digests) - 1, len(text)))
            if len(digests) == TOGETHER or number == len(stored.lengths):
                old[begin:number] = known = seen.add(b"".join(digests))
                text_bytes += sum(count for place, count in texts if not (drop and known[place]))
                begin, digests, texts = number, [], []
                progress(number, size)
        return held, old, closed, text_bytes
