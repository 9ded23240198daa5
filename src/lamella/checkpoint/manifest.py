"""What a checkpoint's files must be: `manifest.json` holds the size and SHA-256 digest of each, and its own digest.

DCP loads a flipped bit or a zeroed page without a word, and its `.metadata` is a pickle. So nothing of a checkpoint is
used before its digest was compared.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lamella.errors import UserError

NAME = "manifest.json"
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
    """One file: its name in the checkpoint's folder, its size and the hex digest of its bytes."""

    name: str
    bytes: int
    sha256: str


class Sealed:
    """A new file that takes its digest while it is written, and is synced when it is closed."""

    def __init__(self, path: Path):
        self.name, self.bytes = path.name, 0
        self._hash, self._file = hashlib.sha256(), path.open("xb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)  # in a thread beside the write it was no faster (two cores, two ranks)
        view = memoryview(data)
        while len(view):  # a raw write may be short; on a full disk the next one raises
            view = view[self._file.write(view) :]
        self.bytes += len(data)

    @property
    def entry(self) -> Entry:
        """Of what was written so far."""
        return Entry(self.name, self.bytes, self._hash.hexdigest())

    def __enter__(self) -> "Sealed":
        return self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())


def seal(path: Path, data: bytes) -> Entry:
    """Writes and syncs a whole file."""
    with Sealed(path) as file:
        file.write(data)
    return file.entry


def measure(path: Path) -> Entry:
    """The entry of a file that is there. Raises OSError."""
    with path.open("rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        return Entry(path.name, os.fstat(f.fileno()).st_size, sha256)


def write(folder: Path, entries: list[Entry]) -> None:
    files = {e.name: [e.bytes, e.sha256] for e in sorted(entries, key=lambda e: e.name)}
    seal(folder / NAME, json.dumps({"files": files, "sha256": _digest(files)}, indent=0).encode())


def read(folder: Path) -> dict[str, Entry]:
    """The entries by name. Raises UserError where there is no checkpoint, Damaged, OSError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no checkpoint there; name one of {folder.parent}")
    try:
        manifest = json.loads((folder / NAME).read_bytes())
        files = manifest["files"]
        whole = manifest["sha256"] == _digest(files)
    except FileNotFoundError:
        raise Damaged(f"{folder / NAME}: missing") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{folder / NAME}: altered")
    return {name: Entry(name, *entry) for name, entry in files.items()}


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
        return None if size == entry.bytes and measure(path) == entry else f"{path}: altered"
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


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
