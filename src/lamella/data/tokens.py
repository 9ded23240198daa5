"""Stored tokens: Megatron's indexed data set, one document a sequence, each its ids and a closing eod.

    NAME.bin    the tokens of all documents in a row, little-endian uint16 or int32
    NAME.idx    b"MMIDIDX\\0\\0", version 1 (u64), type code (u8), sequences S (u64), documents + 1 (u64),
                lengths int32 [S], byte offsets int64 [S], first sequence of each document int64 [documents + 1]

The format is that of megatron/core/datasets/indexed_dataset.py. It is written and read here, since importing that
module takes seconds and half of megatron; a test opens our files with Megatron's own reader.
"""

import hashlib
import struct
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lamella.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
CODES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type of the format that holds every id."""
    return CODES[8] if vocab_size < 65536 else CODES[4]


class TokenWriter:
    """Appends documents to NAME.bin; `close` writes NAME.idx. Sizes and digests come from what was written."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.tokens = 0
        self._prefix, self._dtype = prefix, dtype
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self._file: BinaryIO = _bin(prefix).open("wb")

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def add(self, stored: np.ndarray) -> None:
        """Appends one document: int [L], its eod included."""
        raw = stored.astype(self._dtype).tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self._lengths.append(len(stored))
        self.tokens += len(stored)

    def close(self) -> dict[str, str]:
        """Finishes both files; returns the sha256 of each by file name."""
        self._file.close()
        lengths = np.array(self._lengths, "<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, "<i8"), ends])[:-1]
        code = next(c for c, dtype in CODES.items() if dtype == self._dtype)
        header = HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1)
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        index = header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()
        _idx(self._prefix).write_bytes(index)
        digests = (self._digest.hexdigest(), hashlib.sha256(index).hexdigest())
        return dict(zip((_bin(self._prefix).name, _idx(self._prefix).name), digests, strict=True))

    def abandon(self) -> None:
        self._file.close()


class TokenFile:
    """Reads stored documents by memory map. `lengths` is int32 [documents], each with its eod."""

    def __init__(self, prefix: Path):
        """Raises UserError when the files are not of this format or do not fit each other."""
        idx = _idx(prefix)
        with idx.open("rb") as file:
            head = file.read(HEADER.size)
        known = len(head) == HEADER.size
        magic, version, code, count, _ = HEADER.unpack(head) if known else (b"", 0, 0, 0, 0)
        if magic != MAGIC or version != 1 or code not in CODES:
            raise UserError(f"{idx}: not an index of uint16 or int32 tokens; prepare the data again with --force")
        whole = np.asarray(np.memmap(idx, np.uint8, "r"))
        ends = HEADER.size + np.cumsum([4 * count, 8 * count])
        self.lengths = whole[HEADER.size : ends[0]].view("<i4")
        self._tokens = np.asarray(np.memmap(_bin(prefix), CODES[code], "r"))
        self._begins = whole[ends[0] : ends[1]].view("<i8") // CODES[code].itemsize
        if int(self.lengths.sum(dtype=np.int64)) != len(self._tokens):
            raise UserError(f"{idx}: does not fit {_bin(prefix).name}; prepare the data again with --force")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Stored tokens [length] of a document from `offset` on: a read-only view of the map."""
        length = int(self.lengths[document]) - offset if length is None else length
        begin = int(self._begins[document]) + offset
        return self._tokens[begin : begin + length]


def _bin(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def _idx(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")
