"""Stored tokens: Megatron's indexed data set, one document a sequence, each its ids and a closing eod.

    NAME.bin    the tokens of all documents in a row, little-endian uint16 or int32
    NAME.idx    b"MMIDIDX\\0\\0", version 1 (u64), type code (u8), sequences S (u64), documents + 1 (u64),
                lengths int32 [S], byte offsets int64 [S], first sequence of each document int64 [documents + 1]
    NAME.sums   checksums of NAME.bin (blocks.py)

The format is that of megatron/core/datasets/indexed_dataset.py. It is written and read here, since importing that
module takes seconds and half of megatron; a test opens our files with Megatron's own reader.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lamella.data.store.blocks import BLOCK, SUM, Blocks, Summer
from lamella.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are of floats
DTYPES = {code: np.dtype(name) for code, name in CODES.items()}
CHUNK = 1 << 20  # documents written at once
AGAIN = "prepare the data again with --force"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type of the format that holds every id, of those that Megatron itself writes."""
    return DTYPES[8] if vocab_size < 65536 else DTYPES[4]


def part(prefix: Path, suffix: str) -> Path:
    """NAME.suffix of NAME, which may have dots of its own."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


@dataclass(frozen=True)
class Written:
    """How far a file has come: `bytes` of tokens, and `documents`."""

    bytes: int = 0
    documents: int = 0


class TokenWriter:
    """Appends documents to NAME.bin and NAME.sums; `close` writes NAME.idx.

    What `sync` has returned outlives a kill: another writer goes on from there. The lengths lie in a file of their own
    until then, so that memory does not grow.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, lengths: Path | None = None, begin: Written | None = None):
        """`lengths`: the file for them (None: beside the others, removed by `close`); `begin`: go on from there."""
        begin = begin or Written()
        self._prefix, self._dtype = prefix, dtype
        self._lengths_file, self._keep = lengths or part(prefix, "lengths"), lengths is not None
        self._size, self.documents = begin.bytes, begin.documents
        self._bin = _open_at(part(prefix, "bin"), begin.bytes)
        self._sums = _open_at(part(prefix, "sums"), begin.bytes // BLOCK * SUM.itemsize)
        self._lengths = _open_at(self._lengths_file, begin.documents * 4)
        with part(prefix, "bin").open("rb") as file:
            file.seek(begin.bytes // BLOCK * BLOCK)
            self._summer = Summer(file.read())

    @property
    def tokens(self) -> int:
        return self._size // self._dtype.itemsize

    def add(self, stored: np.ndarray) -> None:
        """Appends one document: int [L], its eod included."""
        self.extend(stored.astype(self._dtype).tobytes(), np.array([len(stored)], "<i4"))

    def extend(self, raw: bytes | memoryview, lengths: np.ndarray) -> None:
        """Appends documents of `lengths` tokens, whose bytes lie one behind the other in `raw`."""
        self._bin.write(raw)
        self._sums.write(self._summer.add(raw))
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._size += len(raw)
        self.documents += len(lengths)

    def sync(self) -> Written:
        """Puts on the disk what was added so far."""
        for file in (self._bin, self._sums, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        return Written(self._size, self.documents)

    def close(self) -> None:
        """Finishes the files."""
        self._sums.write(self._summer.end())
        self.abandon()
        write_index(part(self._prefix, "idx"), self._dtype, *_from_lengths(self._lengths_file, self._dtype.itemsize))
        if not self._keep:
            self._lengths_file.unlink()

    def abandon(self) -> None:
        for file in (self._bin, self._sums, self._lengths):
            file.close()


def write_index(file: Path, dtype: np.dtype, lengths: np.ndarray, offsets: Iterator[np.ndarray]) -> None:
    """One document a sequence: `lengths` int [documents] in tokens, `offsets` in bytes, chunk by chunk."""
    code = next(c for c, known in DTYPES.items() if known == dtype)
    with file.open("wb") as out:
        out.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for begin in range(0, len(lengths), CHUNK):
            out.write(lengths[begin : begin + CHUNK].astype("<i4").tobytes())
        for some in offsets:
            out.write(some.astype("<i8").tobytes())
        for begin in range(0, len(lengths) + 1, CHUNK):
            out.write(np.arange(begin, min(begin + CHUNK, len(lengths) + 1), dtype="<i8").tobytes())


class TokenFile:
    """Reads stored documents by memory map. `lengths` is int32 [documents], each with its eod.

    `eod`: the id that every document of a foreign data set lacks; it is read behind each.
    """

    def __init__(self, prefix: Path, sums: bool = True, eod: int | None = None):
        """Raises UserError when the files are not of this format or do not fit each other."""
        index = read_index(part(prefix, "idx"))
        dtype = index.dtype
        if len(index.documents) != len(index.lengths) + 1:
            raise UserError(f"{part(prefix, 'idx')}: not one document a sequence; {AGAIN}")
        raw = _map(part(prefix, "bin"))
        ends = index.offsets + index.lengths.astype(np.int64) * dtype.itemsize
        if len(raw) % dtype.itemsize or (len(ends) and not 0 <= int(ends.max()) <= len(raw)):
            raise UserError(f"{part(prefix, 'idx')}: does not fit {prefix.name}.bin; {AGAIN}")
        self._tokens, self._eod, self._itemsize = raw.view(dtype), eod, dtype.itemsize
        self._offsets, self._stored = index.offsets, index.lengths
        self.lengths = index.lengths if eod is None else index.lengths + np.int32(1)
        self.blocks: Blocks | None = None
        if sums:
            table = _map(part(prefix, "sums"))
            if len(table) % SUM.itemsize:
                raise UserError(f"{part(prefix, 'sums')}: damaged; {AGAIN}")
            self.blocks = Blocks(part(prefix, "bin"), raw, table.view(SUM), self._documents_between)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Stored tokens [length] of a document from `offset` on: a read-only view of the map where it can be.

        Raises Damaged: a block that holds one of them is not what was written.
        """
        length = int(self.lengths[document]) - offset if length is None else length
        eod = self._eod
        closing = eod is not None and offset + length == self.lengths[document]
        size = self._itemsize
        begin = int(self._offsets[document]) + offset * size
        end = begin + (length - closing) * size
        if self.blocks is not None:
            self.blocks.check(begin, end)
        found = self._tokens[begin // size : end // size]
        return np.append(found, np.int32(eod)) if eod is not None and closing else found

    def quarantine(self, block: int) -> None:
        """Blocks.quarantine."""
        assert self.blocks is not None
        self.blocks.quarantine(block)

    def _documents_between(self, begin: int, end: int) -> range:
        """Those with a byte of begin <= b < end; offsets ascend."""
        ends = self._offsets + self._stored.astype(np.int64) * self._itemsize
        return range(int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(self._offsets, end, "left")))


@dataclass(frozen=True)
class Index:
    """What an .idx says. lengths int32 and offsets int64 (bytes) [sequences]; documents int64: first sequences."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def read_index(file: Path) -> Index:
    """Maps an .idx. Raises UserError: missing, not such a file, of floats, or truncated."""
    try:
        whole = _map(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    head = whole[: HEADER.size].tobytes()
    magic, version, code, count, documents = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0, 0, 0)
    if magic != MAGIC or version != 1:
        raise UserError(f"{file}: not an index of Megatron's format, version 1; name another, or {AGAIN}")
    if code not in DTYPES:
        raise UserError(f"{file}: its tokens are of type code {code}, not whole numbers; name another, or {AGAIN}")
    ends = HEADER.size + np.cumsum([4 * count, 8 * count, 8 * documents], dtype=np.float64)
    if ends[-1] != len(whole):
        raise UserError(f"{file}: has {len(whole):,} bytes, its header says {int(ends[-1]):,}: damaged; restore it")
    a, b = int(ends[0]), int(ends[1])
    return Index(DTYPES[code], whole[HEADER.size : a].view("<i4"), whole[a:b].view("<i8"), whole[b:].view("<i8"))


def _map(file: Path) -> np.ndarray:
    """uint8 [bytes]: a read-only map, which an empty file cannot have."""
    if not file.stat().st_size:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "r"))


def _open_at(file: Path, size: int) -> BinaryIO:
    """For appending behind its first `size` bytes."""
    opened = file.open("r+b" if size else "wb")
    opened.truncate(size)
    opened.seek(size)
    return opened


def _from_lengths(file: Path, itemsize: int) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    lengths = _map(file).view("<i4")

    def offsets() -> Iterator[np.ndarray]:
        begin = 0
        for first in range(0, len(lengths), CHUNK):
            ends = begin + np.cumsum(lengths[first : first + CHUNK], dtype=np.int64) * itemsize
            yield np.concatenate([[begin], ends[:-1]])
            begin = int(ends[-1])

    return lengths, offsets()
