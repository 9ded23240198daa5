"""Documents from where they lie: one file, record or row is one document, as a Python string.

Text files are read here rather than through `datasets`, whose text builder turns \\r\\n into \\n: a document is its
file's exact characters. Records (jsonl, parquet, hub) come through Hugging Face `datasets`. The order is fixed: files
by their sorted relative path, records as they stand in them.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lamella.config import SourceConfig
from lamella.errors import UserError

RECORD_SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
}
# Source and text. Not .decTest: 4 MB of decimal digits that are test data.
STDLIB_SUFFIXES = (
    ".py", ".pyi", ".c", ".cpp", ".h", ".js", ".sh", ".bat", ".fish", ".ps1", ".css", ".html",
    ".txt", ".rst", ".md", ".cfg", ".ini", ".json", ".toml", ".xml",
)  # fmt: skip
STDLIB_SKIPPED = frozenset(("site-packages", "dist-packages", "__pycache__"))


def read(source: SourceConfig) -> Iterator[str | None]:
    """Yields each document of a source; None stands for a file that holds no UTF-8 text, "" for an empty document.

    Raises UserError: nothing at the path, unreadable file or records, missing column, a value that is no text.
    """
    if source.format in ("stdlib", "text"):
        root, files = list_files(source)
        alone = source.path is not None and Path(source.path).expanduser().is_file()
        for file in files:
            text = _read_text(root / file, tolerant=source.format == "stdlib")
            if text is None and alone:
                raise UserError(f"{file}: not UTF-8 text; name text files, or convert it")
            yield text
    else:
        yield from _column(source, _records(source))


def list_files(source: SourceConfig) -> tuple[Path, list[str]]:
    """The folder and the sorted relative paths of a source's files. Raises UserError when there is none."""
    if source.format == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return root, [f for f in _walk(root, STDLIB_SKIPPED) if Path(f).suffix in STDLIB_SUFFIXES]
    assert source.path is not None, "config.py requires it"
    path = Path(source.path).expanduser()
    suffixes = RECORD_SUFFIXES.get(source.format, ("",))
    if path.is_file():
        return Path(), [str(path)]
    if path.is_dir():
        files = [f for f in _walk(path, frozenset()) if f.endswith(suffixes)]
        if not files:
            raise UserError(f"{path}: no {source.format} file in this folder" + _expected(suffixes))
        return path, files
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    files = sorted(f for f in found if Path(f).is_file())
    if not files:
        kind = "no file matches" if glob.has_magic(str(path)) else "no such file or folder"
        raise UserError(f"{path}: {kind}; sources.path is a file, a folder or a glob, seen from {Path.cwd()}")
    return Path(), files


def fingerprint(sources: Iterable[SourceConfig]) -> str:
    """A digest that changes when a file comes, goes, or changes size or time. Reads no content.

    A hub data set counts by its name and split alone, so that looking costs no network.
    Raises UserError as `list_files` does.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.model_dump_json().encode())
        if source.format == "hub":
            continue
        root, files = list_files(source)
        for file in files:
            stat = (root / file).stat()
            digest.update(json.dumps([file, stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()


def _walk(root: Path, skipped: frozenset[str]) -> list[str]:
    """Sorted relative paths of the files below `root`, without hidden ones and broken links."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        paths = (Path(folder, f) for f in files if not f.startswith("."))
        found += [p.relative_to(root).as_posix() for p in paths if p.is_file()]
    return sorted(found)


def _read_text(file: Path, tolerant: bool) -> str | None:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    except OSError as error:
        if tolerant:
            return None
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _records(source: SourceConfig) -> Iterator[Any]:
    """The records of a source through `datasets`; local files are streamed, so no copy lands in its cache."""
    where = None if source.format == "hub" else list_files(source)  # a missing path is told before the slow import
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source.format} sources need the package datasets: pip install datasets") from None

    assert source.path is not None, "config.py requires it"
    try:
        if where is None:
            yield from datasets.load_dataset(source.path, split=source.split)
        else:
            root, files = where
            kind = "json" if source.format == "jsonl" else "parquet"
            names = [str((root / f).absolute()) for f in files if (root / f).stat().st_size]
            if names:  # datasets fails on empty files
                datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a fault is told once, below
                yield from datasets.load_dataset(kind, data_files=names, split="train", streaming=True)
    except Exception as error:  # datasets, pyarrow and the hub's client each raise their own kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        cure = "check its name and split, and the network" if where is None else "mend or leave out that file"
        raise UserError(f"{source.path}: cannot be read as {source.format} ({reason}); {cure}") from None


def _column(source: SourceConfig, records: Iterator[Any]) -> Iterator[str]:
    for number, record in enumerate(records):
        if source.column not in record:
            known = ", ".join(map(str, record))
            raise UserError(f"{source.path}: no column {source.column!r}; there is {known}: set sources.column")
        value = record[source.column]
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"{source.path}: column {source.column!r} holds {kind} in record {number}, not text")
        yield value or ""


def _expected(suffixes: tuple[str, ...]) -> str:
    return f"; expected names in {', '.join(suffixes)}" if suffixes != ("",) else ""
