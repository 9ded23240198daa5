"""What a checkpoint's files must be: `manifest.json` holds the size and digest of each, and its own digest.

The digest is XXH3 of 128 bits: several times as fast as SHA-256, against damage, and no proof of who wrote a file. DCP
loads a flipped bit or a zeroed page without a word. So nothing of a checkpoint is used before its digest was compared.
"""

import dataclasses
import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from lamella.errors import UserError

NAME = "manifest.json"
BLOCK = 2**20  # bytes; what a cache holds
SYNCED = 16 * 2**20  # bytes that the disk is given at once
ALGORITHMS: dict[str, Any] = {"xxh3_128": xxh3_128, "sha256": hashlib.sha256}  # the second: of older manifests
CURE = "delete this checkpoint to continue from an earlier one"


class Damaged(UserError):
    """Files of a checkpoint are not what was written; `what` names them."""

    def __init__(self, what: str):
        super().__init__(f"{what}; {CURE}")
        self.what = what

    def __reduce__(self) -> tuple[type["Damaged"], tuple[str]]:  # it travels between processes
        return Damaged, (self.what,)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file: its name in the checkpoint's folder, its size and the hex digest of its bytes, one of ALGORITHMS."""

    name: str
    bytes: int
    digest: str
    algorithm: str = "xxh3_128"


class Sealed:
    """A new file that takes its digest while it is written, and is synced when it is closed.

    The disk is told to write every so often, and does so while the next bytes are made.
    """

    def __init__(self, path: Path):
        self.name, self.bytes = path.name, 0
        self._hash, self._file = xxh3_128(), path.open("xb", buffering=0)
        self._disk, self._syncing, self._synced = ThreadPoolExecutor(1), Future[None](), 0
        self._syncing.set_result(None)

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)  # in a thread beside the write it was no faster (two cores, two ranks)
        view = memoryview(data)
        while len(view):  # a raw write may be short; on a full disk the next one raises
            view = view[self._file.write(view) :]
        self.bytes += len(data)
        if self.bytes - self._synced >= SYNCED and self._syncing.done():
            self._syncing.result()
            self._syncing, self._synced = self._disk.submit(os.fdatasync, self._file.fileno()), self.bytes

    @property
    def entry(self) -> Entry:
        """Of what was written so far."""
        return Entry(self.name, self.bytes, self._hash.hexdigest())

    def __enter__(self) -> "Sealed":
        return self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        with self._file, self._disk:
            if kind is None:
                self._syncing.result()
                os.fsync(self._file.fileno())


def seal(path: Path, data: bytes) -> Entry:
    """Writes and syncs a whole file."""
    with Sealed(path) as file:
        file.write(data)
    return file.entry


def measure(path: Path, algorithm: str = "xxh3_128") -> Entry:
    """The entry of a file that is there. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        digest, size = ALGORITHMS[algorithm](), 0
        block = memoryview(bytearray(BLOCK))
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return Entry(path.name, size, digest.hexdigest(), algorithm)


def write(folder: Path, entries: list[Entry]) -> None:
    files = {e.name: [e.bytes, e.digest] for e in sorted(entries, key=lambda e: e.name)}
    seal(folder / NAME, json.dumps({"files": files, "xxh3_128": _digest(files)}, indent=0).encode())


def read(folder: Path) -> dict[str, Entry]:
    """The entries by name. Raises UserError where there is no checkpoint, Damaged, OSError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no checkpoint there; name one of {folder.parent}")
    try:
        manifest = json.loads((folder / NAME).read_bytes())
        files = manifest["files"]
        algorithm = next(name for name in ALGORITHMS if name in manifest)
        whole = manifest[algorithm] == _digest(files, algorithm)
    except FileNotFoundError:
        raise Damaged(f"{folder / NAME}: missing") from None
    except (ValueError, KeyError, TypeError, StopIteration):
        whole = False
    if not whole:
        raise Damaged(f"{folder / NAME}: altered")
    return {name: Entry(name, size, digest, algorithm) for name, (size, digest) in files.items()}


def damage(folder: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """One "path: missing|truncated|altered|unreadable" a damaged file, of every `ranks`-th file from `rank` on.

    Raises UserError as `read` does, OSError.
    """
    entries = sorted(read(folder).values(), key=lambda e: (-e.bytes, e.name))  # large and small files to every rank
    return [line for entry in entries[rank::ranks] if (line := fault(folder / entry.name, entry))]


def fault(path: Path, entry: Entry) -> str | None:
    """One line, "path: missing|truncated|altered|unreadable", or None where the file is what the entry says."""
    try:
        size = path.stat().st_size
        if size < entry.bytes:
            return f"{path}: truncated"
        return None if size == entry.bytes and measure(path, entry.algorithm) == entry else f"{path}: altered"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: unreadable ({error.strerror})"


def sync(folder: Path) -> None:
    """Makes names that were added to a folder last."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest(files: Any, algorithm: str = "xxh3_128") -> str:
    return ALGORITHMS[algorithm](json.dumps(files, sort_keys=True).encode()).hexdigest()
