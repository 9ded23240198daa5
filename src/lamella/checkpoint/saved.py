"""What `torch.save` wrote, read as data: the pickle by `unpickle`, each tensor a view of the file when asked for.

The format: a zip file of uncompressed entries, ROOT/data.pkl and ROOT/data/KEY, one a storage. It may lie within a
larger file, as in DCP's.
"""

import dataclasses
import math
import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lamella.checkpoint.unpickle import Known, read_pickle
from lamella.errors import UserError

STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
LOCAL_HEADER = 30  # bytes before an entry's name


@dataclasses.dataclass(frozen=True)
class Storage:
    """`at`: of its first byte in the file."""

    file: Path
    at: int
    dtype: torch.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class Saved:
    """A tensor in a file."""

    storage: Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def tensor(self) -> Tensor:
        """A view of the file: what is not touched is not read. Raises UserError where the file is shorter."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        storage = self.storage
        bytes_ = storage.count * storage.dtype.itemsize
        before = storage.at % mmap.ALLOCATIONGRANULARITY
        try:
            with storage.file.open("rb") as file:  # no more than the storage: a whole file may exceed the memory
                mapped = mmap.mmap(file.fileno(), before + bytes_, access=mmap.ACCESS_COPY, offset=storage.at - before)
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=bytes_, offset=before)
        except (OSError, ValueError) as error:
            raise UserError(f"{storage.file}: damaged ({error}); fetch the file again") from None
        if before % storage.dtype.itemsize:  # DCP's files align nothing
            raw = raw.clone()
        flat = raw.view(storage.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset)


def read_saved(file: Path, at: int = 0, length: int | None = None) -> Any:
    """What was saved in `length` bytes from `at`, or in the whole file, with `Saved` for each tensor.

    Raises UserError: not there, damaged, of a torch before 1.6, holds what is no plain data.
    """
    try:
        with file.open("rb") as opened:
            window = _Window(opened, at, length)
            with zipfile.ZipFile(window) as packed:  # type: ignore[arg-type]
                return _read(packed, window, file)
    except FileNotFoundError:
        raise UserError(f"{file}: missing; fetch the file again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except Exception as error:  # zipfile on damaged bytes
        text = " ".join(str(error).split())[:80] or type(error).__name__
        raise UserError(f"{file}: damaged, or not of torch.save ({text}); fetch the file again") from None


def _read(packed: zipfile.ZipFile, window: "_Window", file: Path) -> Any:
    entries = {info.filename.partition("/")[2]: info for info in packed.infolist()}
    if "data.pkl" not in entries:
        raise UserError(f"{file}: not what torch.save writes")
    if "byteorder" in entries and window.entry(entries["byteorder"]) != b"little":
        raise UserError(f"{file}: of a big-endian machine, which is not read here")

    def refer(pid: Any) -> Storage:
        kind, dtype, key, _, count = pid
        info = entries[f"data/{key}"]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a storage of another kind")
        if not isinstance(count, int) or not 0 <= count * dtype.itemsize <= info.file_size:
            raise ValueError("a storage that is larger than its entry")
        start = window.start_of(info)
        if start + info.file_size > window.size:
            raise ValueError("a storage that the file does not hold")
        return Storage(file, window.start + start, dtype, count)

    more: dict[str, Any] = {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}
    more["torch._utils._rebuild_tensor_v2"] = Known("torch._utils._rebuild_tensor_v2", _tensor)
    return read_pickle(window.entry(entries["data.pkl"]), str(file), more, refer)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Saved:
    shape, steps = tuple(size), tuple(stride)
    whole = (offset, *shape, *steps)
    if not isinstance(storage, Storage) or len(shape) != len(steps):
        raise ValueError("a tensor without a storage")
    if not all(type(n) is int and n >= 0 for n in whole):
        raise ValueError("a tensor of no whole sizes")
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if math.prod(shape) and last >= storage.count:
        raise ValueError("a tensor beyond its storage")
    return Saved(storage, offset, shape, steps)


class _Window:
    """A part of a file, as a file for `zipfile`."""

    def __init__(self, file: BinaryIO, start: int, length: int | None):
        self.file, self.start = file, start
        end = file.seek(0, 2)
        self.size = end - start if length is None else length
        if not 0 <= start <= start + self.size <= end:
            raise ValueError("shorter than it should be")
        self.at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        raw = self.part(self.at, left if count is None or count < 0 else min(count, left))
        self.at += len(raw)
        return raw

    def start_of(self, info: zipfile.ZipInfo) -> int:
        """Where the bytes of an entry begin."""
        name, extra = struct.unpack("<HH", self.part(info.header_offset + 26, 4))
        return info.header_offset + LOCAL_HEADER + name + extra

    def entry(self, info: zipfile.ZipInfo) -> bytes:
        """An entry as it is; `zipfile` would compare a checksum that torch.save may leave out."""
        return self.part(self.start_of(info), info.file_size)

    def part(self, offset: int, count: int) -> bytes:
        self.file.seek(self.start + offset)
        return self.file.read(count)
