"""Megatron data sets that are there already: found, and looked at without a copy."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamella.config import SourceConfig
from lamella.data.store.tokens import part, read_index
from lamella.errors import UserError


@dataclass(frozen=True)
class Stored:
    """The documents of PREFIX.bin that are not empty, in the file's order.

    offsets int64 (bytes) and lengths int32 (tokens) [documents]; `empty`: how many others there are.
    """

    prefix: Path
    dtype: np.dtype
    offsets: np.ndarray
    lengths: np.ndarray
    empty: int

    @property
    def bin(self) -> Path:
        return part(self.prefix, "bin")

    def documents(self) -> Iterator[np.ndarray]:
        """Yields the ids of each document, a view of the map."""
        size = self.dtype.itemsize
        raw = np.asarray(np.memmap(self.bin, np.uint8, "r"))
        for begin, length in zip(self.offsets.tolist(), self.lengths.tolist(), strict=True):
            yield raw[begin : begin + length * size].view(self.dtype)


def prefixes(source: SourceConfig) -> list[Path]:
    """What stands before .bin and .idx, sorted. Raises UserError when there is none, or a .bin is missing."""
    assert source.path is not None, "config.py requires it"
    path = Path(source.path).expanduser()
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    if part(path, "idx").is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(f.with_suffix("") for f in path.rglob("*.idx"))
    else:
        found = sorted({Path(f).with_suffix("") for f in glob.glob(f"{path}*", recursive=True) if f.endswith(".idx")})  # noqa: PTH207
        found = found if glob.has_magic(str(path)) else []
    if not found:
        raise UserError(f"{path}: no Megatron data set; sources.path is what stands before .bin and .idx, or a folder")
    for prefix in found:
        if not part(prefix, "bin").is_file():
            raise UserError(f"{part(prefix, 'bin')}: missing beside its .idx; restore it")
    return [prefix.absolute() for prefix in found]


def look(prefix: Path) -> Stored:
    """A document's several sequences, which lie one behind the other, are one here.

    Raises UserError: not an index of tokens, one that does not fit its .bin, or documents in pieces.
    """
    file = part(prefix, "idx")
    index = read_index(file)
    size = index.dtype.itemsize
    ends = index.offsets + index.lengths.astype(np.int64) * size
    total = part(prefix, "bin").stat().st_size
    firsts, sequences = index.documents, len(index.lengths)
    if len(firsts) < 1 or firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise UserError(f"{file}: its documents do not cover its {sequences:,} sequences: damaged; restore it")
    if sequences and (int(index.offsets.min()) < 0 or int(index.lengths.min()) < 0 or int(ends.max()) > total):
        raise UserError(f"{file}: does not fit {prefix.name}.bin of {total:,} bytes: one of them is damaged")
    if total % size:
        raise UserError(f"{part(prefix, 'bin')}: {total:,} bytes are no whole number of tokens: damaged; restore it")
    inside = np.ones(sequences + 1, bool)
    inside[firsts] = False
    broken = np.flatnonzero(inside[1:-1] & (index.offsets[1:] != ends[:-1])) if sequences else []
    if len(broken):
        document = int(np.searchsorted(firsts, broken[0] + 1, "right")) - 1
        raise UserError(f"{file}: document {document} lies in several pieces; write the data set again in order")
    filled = np.flatnonzero(np.diff(firsts))  # a document may have no sequence at all
    begins = index.offsets[firsts[:-1][filled]]
    lengths = (ends[firsts[1:][filled] - 1] - begins) // size
    if len(lengths) and int(lengths.max()) >= 2**31 - 1:
        raise UserError(f"{file}: a document of {int(lengths.max()):,} tokens; at most 2,147,483,646 can be stored")
    order = np.argsort(begins, kind="stable")
    order = order[lengths[order] > 0]
    empty = len(firsts) - 1 - len(order)
    return Stored(prefix, index.dtype, begins[order], lengths[order].astype(np.int32), empty)
