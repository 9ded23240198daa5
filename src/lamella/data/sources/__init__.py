"""Documents from where they lie: one file, record or row is one document, as UTF-8.

The order is fixed: files by their sorted relative path, records as they stand in them. A position is what `batches`
goes on from, as JSON.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lamella.config import SourceConfig
from lamella.data.sources import files, megatron

Position = Any
FILES = ("stdlib", "text")


def names(sources: Iterable[SourceConfig]) -> list[str]:
    """The folder of each source's tokens: its name, else its format or its path's stem; an equal one gets -2, -3."""
    sources = list(sources)
    taken = {s.name for s in sources if s.name is not None}
    found = []
    for source in sources:
        stem = Path(source.path or source.format).name.split(".")[0]
        name = source.name or free(re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or source.format, taken)
        taken.add(name)
        found.append(name)
    return found


def free(name: str, taken: set[str]) -> str:
    """`name`, or the first of NAME-2, NAME-3, ... that is not taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def batches(source: SourceConfig, position: Position = None) -> Iterator[tuple[list[bytes], Position]]:
    """Yields some documents and the position behind them; b"" is an empty one. Files may hold what is no UTF-8.

    Raises UserError: nothing at the path, unreadable file or records, missing column, a value that is no text.
    """
    if source.format in FILES:
        return files.batches(source, position)
    from lamella.data.sources import records

    return records.batches(source, position)


def read(source: SourceConfig) -> Iterator[str | None]:
    """Yields each document as text; None stands for what is no UTF-8. Raises UserError as `batches` does."""
    for raws, _ in batches(source):
        for raw in raws:
            yield decode(raw)


def decode(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def text_bytes(sources: Iterable[SourceConfig]) -> int | None:
    """Of all documents, where their files tell it. Raises UserError as `batches` does."""
    total = 0
    for source in sources:
        if source.format not in FILES:
            return None
        root, found = files.list_files(source)
        total += sum((root / f).stat().st_size for f in found)
    return total


def fingerprint(sources: Iterable[SourceConfig]) -> str:
    """A digest that changes when a file comes, goes, or changes size or time. Reads no content.

    A hub data set counts by its name and split alone, so that looking costs no network.
    Raises UserError as `batches` does.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.prepared.model_dump_json().encode())
        for file in _files(source):
            stat = file.stat()
            digest.update(json.dumps([str(file), stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()


def _files(source: SourceConfig) -> Iterator[Path]:
    if source.format == "megatron":
        for prefix in megatron.prefixes(source):
            yield from (megatron.part(prefix, suffix) for suffix in ("idx", "bin"))
    elif source.format != "hub":
        root, found = files.list_files(source)
        yield from (root / file for file in found)
