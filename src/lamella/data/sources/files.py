"""Files: which ones a source names, and text files as documents.

Text is read here rather than through `datasets`, whose text builder turns \\r\\n into \\n: a document is its file's
exact bytes.
"""

import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lamella.config import SourceConfig
from lamella.errors import UserError

SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "megatron": (".idx",),
}
# Source and text. Not .decTest: 4 MB of decimal digits that are test data.
STDLIB_SUFFIXES = (
    ".py", ".pyi", ".c", ".cpp", ".h", ".js", ".sh", ".bat", ".fish", ".ps1", ".css", ".html",
    ".txt", ".rst", ".md", ".cfg", ".ini", ".json", ".toml", ".xml",
)  # fmt: skip
STDLIB_SKIPPED = frozenset(("site-packages", "dist-packages", "__pycache__"))
TOGETHER = 1 << 18  # bytes of small files that are handed on together


def list_files(source: SourceConfig) -> tuple[Path, list[str]]:
    """The folder and the sorted relative paths of a source's files. Raises UserError when there is none."""
    if source.format == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return root, [f for f in _walk(root, STDLIB_SKIPPED) if Path(f).suffix in STDLIB_SUFFIXES]
    assert source.path is not None, "config.py requires it"
    path = Path(source.path).expanduser()
    suffixes = SUFFIXES.get(source.format, ("",))
    if path.is_file():
        return Path(), [str(path)]
    if path.is_dir():
        # `datasets` keeps results of its own beside what it saved
        files = [f for f in _walk(path, frozenset()) if f.endswith(suffixes) and not Path(f).name.startswith("cache-")]
        if not files:
            raise UserError(f"{path}: no {source.format} file in this folder" + _expected(suffixes))
        return path, files
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    files = sorted(f for f in found if Path(f).is_file())
    if not files:
        kind = "no file matches" if glob.has_magic(str(path)) else "no such file or folder"
        raise UserError(f"{path}: {kind}; sources.path is a file, a folder or a glob, seen from {Path.cwd()}")
    return Path(), files


def batches(source: SourceConfig, position: int | None) -> Iterator[tuple[list[bytes], int]]:
    """Yields the contents of some files, and the number of the next one."""
    root, files = list_files(source)
    alone = source.path is not None and Path(source.path).expanduser().is_file()
    raws, size = [], 0
    for number in range(position or 0, len(files)):
        file = root / files[number]
        raws.append(_read(file, tolerant=source.format == "stdlib"))
        size += len(raws[-1])
        if alone:
            _must_be_text(file, raws[-1])
        if size >= TOGETHER or number == len(files) - 1:
            yield raws, number + 1
            raws, size = [], 0


def _walk(root: Path, skipped: frozenset[str]) -> list[str]:
    """Sorted relative paths of the files below `root`, without hidden ones and broken links."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        paths = (Path(folder, f) for f in files if not f.startswith("."))
        found += [p.relative_to(root).as_posix() for p in paths if p.is_file()]
    return sorted(found)


def _read(file: Path, tolerant: bool) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        if tolerant:
            return b"\xff"  # no text
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _must_be_text(file: Path, raw: bytes) -> None:
    try:
        raw.decode()
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; name text files, or convert it") from None


def _expected(suffixes: tuple[str, ...]) -> str:
    return f"; expected names in {', '.join(suffixes)}" if suffixes != ("",) else ""
