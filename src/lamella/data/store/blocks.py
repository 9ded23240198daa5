"""Checksums of a file by blocks: a byte is looked at before it is used, and only once.

NAME.sums   XXH3-64 of each 256 KiB of NAME.bin, little-endian uint64; the last block is short
"""

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from lamella.errors import UserError

SHIFT = 18
BLOCK = 1 << SHIFT  # bytes
SUM = np.dtype("<u8")


class Damaged(UserError):
    """A block is not what was written. `documents` are those that have a byte in it; `begin` and `end` are bytes."""

    def __init__(self, file: Path, block: int, begin: int, end: int, documents: range):
        super().__init__(file, block, begin, end, documents)  # so that it can be pickled
        self.file, self.block, self.begin, self.end, self.documents = file, block, begin, end, documents

    def __str__(self) -> str:
        count = len(self.documents)
        which = f"documents {self.documents.start} to {self.documents.stop - 1}" if count else "no document"
        which = f"document {self.documents.start}" if count == 1 else which
        return (
            f"{self.file}: damaged: bytes {self.begin:,} to {self.end - 1:,} (block {self.block}, {which}) are not "
            "what was prepared; restore the file, prepare it again (`lamella data prepare FILE --force`), or train "
            "without them: train.rows.damaged=replace"
        )


class Summer:
    """Sums of what is appended. `take` returns those of the blocks that have become whole."""

    def __init__(self, rest: bytes = b""):
        """`rest`: what the last block already holds."""
        self._hash, self._held = xxhash.xxh3_64(rest), len(rest)

    def add(self, raw: bytes | memoryview) -> bytes:
        """Returns the sums of the blocks that this completes."""
        raw = memoryview(raw)
        done = array("Q")
        while self._held + len(raw) >= BLOCK:
            cut = BLOCK - self._held
            self._hash.update(raw[:cut])
            done.append(self._hash.intdigest())
            self._hash.reset()
            raw, self._held = raw[cut:], 0
        self._hash.update(raw)
        self._held += len(raw)
        return np.array(done, SUM).tobytes()

    def end(self) -> bytes:
        """The sum of the short block, if there is one."""
        return np.array([self._hash.intdigest()], SUM).tobytes() if self._held else b""


class Blocks:
    """Compares the blocks of a mapped file with their sums, each when it is first touched.

    Threads may ask at once: a block is then looked at twice, to the same end.
    """

    def __init__(self, file: Path, raw: np.ndarray, sums: np.ndarray, documents: Callable[[int, int], range]):
        """`raw`: uint8 [bytes]; `documents(begin, end)`: those with a byte between, for the message.

        Raises UserError: the sums are not those of so many bytes.
        """
        if len(sums) != -(-len(raw) // BLOCK):
            raise UserError(f"{file}: has {len(raw):,} bytes, its sums are of {len(sums):,} blocks; prepare it again")
        self._file, self._raw, self._sums, self._documents = file, raw, sums, documents
        self._good = bytearray(len(sums))
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self._sums)

    def quarantine(self, block: int) -> None:
        """From now on touching this block raises Damaged, whatever it holds."""
        self._bad.add(block)
        self._good[block] = 0

    def check(self, begin: int, end: int) -> None:
        """Raises Damaged when a block that holds one of the bytes begin <= b < end is not what was written."""
        first = begin >> SHIFT
        if end > begin and self._good.find(0, first, ((end - 1) >> SHIFT) + 1) >= 0:
            for block in range(first, ((end - 1) >> SHIFT) + 1):
                if not self._good[block]:
                    self._look(block)

    def _look(self, block: int) -> None:
        begin, end = block << SHIFT, min((block + 1) << SHIFT, len(self._raw))
        if block in self._bad or xxhash.xxh3_64_intdigest(self._raw[begin:end].data) != int(self._sums[block]):
            self._bad.add(block)
            raise Damaged(self._file, block, begin, end, self._documents(begin, end))
        self._good[block] = 1
