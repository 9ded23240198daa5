"""How far a preparing has come, on the disk: what a call after a kill goes on from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field

from lamella.config import DataConfig, Strict
from lamella.data.prepare.seen import WIDTH
from lamella.data.store.manifest import SPLITS, VERSION, SourceEntry
from lamella.data.store.tokens import Written, part

FORMAT = 1
NAME = "journal.json"


class Tally(Strict):
    """Counts of one source so far."""

    text_bytes: dict[str, int] = Field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    skipped: dict[str, int] = Field(default_factory=lambda: {"empty": 0, "not text": 0})
    duplicates: int = 0


class Open(Strict):
    """A source that is being read. `written`: bytes and documents by split."""

    name: str
    position: Any = None
    written: dict[str, tuple[int, int]] = Field(default_factory=dict)
    tally: Tally = Tally()

    def at(self, split: str) -> Written:
        return Written(*self.written.get(split, (0, 0)))


class Journal(Strict):
    """`key` tells what is being prepared, from what; `text_bytes` is that of all documents where it is known."""

    key: str
    tokenizer: str  # its fingerprint
    trained: bool  # on these sources
    text_bytes: int | None = None
    done: dict[str, SourceEntry] = Field(default_factory=dict)  # sources that are finished
    open: Open | None = None
    seen: int = 0  # digests


def key(config: DataConfig, origin: str, tokenizer: str | None) -> str:
    """`origin`: the sources' fingerprint; `tokenizer`: the given one's."""
    plain = config.model_copy(update={"path": "", "sources": tuple(s.prepared for s in config.sources)})
    whole = [FORMAT, VERSION, plain.model_dump(mode="json"), origin, tokenizer]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def load(work: Path, key: str) -> Journal | None:
    """The journal there, if it is of `key` and the files hold what it says."""
    found = read(work)
    return found if found is not None and found.key == key and _holds(work, found) else None


def read(work: Path) -> Journal | None:
    try:
        return Journal.model_validate_json((work / NAME).read_text())
    except (OSError, ValueError):
        return None


def save(work: Path, journal: Journal) -> None:
    """Replaces the journal at once. What it tells of must be on the disk."""
    fresh = work / f"{NAME}.new"
    with fresh.open("w") as file:
        file.write(journal.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(work / NAME)
    sync(work)


def sync(file: Path) -> None:
    """Puts a file, or a folder's names, on the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lengths_file(work: Path, name: str, split: str) -> Path:
    return work / "lengths" / name / split


def _holds(work: Path, journal: Journal) -> bool:
    sizes = {work / "seen": journal.seen * WIDTH}
    if (now := journal.open) is not None:
        for split in SPLITS:
            size, documents = now.at(split).bytes, now.at(split).documents
            sizes[part(work / "out" / now.name / split, "bin")] = size
            sizes[lengths_file(work, now.name, split)] = documents * 4
    try:
        return all(not size or file.stat().st_size >= size for file, size in sizes.items())
    except OSError:
        return False
