"""Records of jsonl, parquet and arrow files, and of data sets of the Hugging Face hub, through `datasets`.

Files are streamed one by one, so no copy lands in a cache and a position is (file, record). A data set of the hub is
downloaded whole, or with `streaming` read over the network, where a position is what `datasets` calls a state.
"""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lamella.config import SourceConfig
from lamella.data.sources.files import list_files
from lamella.data.sources.interrupted import Interrupted
from lamella.errors import UserError

BUILDERS = {"jsonl": "json", "parquet": "parquet", "arrow": "arrow"}
ROWS = 64  # handed on together
PARQUET_ROWS = 1024  # decoded together, instead of a whole row group


def batches(source: SourceConfig, position: Any) -> Iterator[tuple[list[bytes], Any]]:
    """Yields some documents and the position behind them. Raises UserError as sources.batches does."""
    where = None if source.format == "hub" else list_files(source)  # a missing path is told before the slow import
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source.format} sources need the package datasets: pip install datasets") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a fault is told once, below
    if where is None:
        yield from _hub(source, position)
        return
    root, files = where
    first, done = position or (0, 0)
    for number in range(first, len(files)):
        file = root / files[number]
        yield from ((raws, [number, record]) for raws, record in _file(source, file, done))
        done = 0


def _file(source: SourceConfig, file: Path, done: int) -> Iterator[tuple[list[bytes], int]]:
    """Those of one file behind its first `done` records."""
    if not file.stat().st_size:  # which `datasets` takes for a fault
        return
    if file.suffix == ".zst" and find_spec("zstandard") is None:
        raise UserError(f"{file}: .zst files need the package zstandard: pip install zstandard")
    with _told(str(file), source.format, "mend or leave out that file", UserError):
        options: dict[str, Any] = {}
        if source.format == "parquet":
            options = {"columns": [source.column], "batch_size": PARQUET_ROWS}
        loaded = _load(source, file, **options)
        if options and source.column not in (loaded.features or ()):
            loaded = _load(source, file)  # all columns, for the message
        count = 0
        for table in loaded.with_format("arrow").iter(ROWS):
            count += len(table)
            if count > done:
                yield _texts(table, source, str(file))[max(0, len(table) - (count - done)) :], count


def _hub(source: SourceConfig, position: Any) -> Iterator[tuple[list[bytes], Any]]:
    import datasets

    assert source.path is not None, "config.py requires it"
    with _told(source.path, "hub data set", "check its name and split, and the network", Interrupted):
        loaded = datasets.load_dataset(source.path, split=source.split, streaming=source.streaming)
        if isinstance(loaded, datasets.IterableDataset):
            tables = loaded.with_format("arrow")
            if position is not None:
                tables.load_state_dict(position)
            for table in tables.iter(ROWS):
                yield _texts(table, source, source.path), tables.state_dict()
        else:
            done = position or 0
            rest = loaded.select(range(done, len(loaded))) if done < len(loaded) else ()
            for table in rest and rest.with_format("arrow").iter(ROWS):
                done += len(table)
                yield _texts(table, source, source.path), done


def _load(source: SourceConfig, file: Path, **options: Any) -> Any:
    import datasets

    kind = BUILDERS[source.format]
    return datasets.load_dataset(kind, data_files=[str(file.absolute())], split="train", streaming=True, **options)


def _texts(table: Any, source: SourceConfig, where: str) -> list[bytes]:
    """The column of an arrow table as UTF-8."""
    import pyarrow

    if source.column not in table.column_names:
        known = ", ".join(map(str, table.column_names))
        raise UserError(f"{where}: no column {source.column!r}; there is {known}: set sources.column")
    column = table.column(source.column)
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pyarrow.types.is_null(kind):
        return [b""] * len(column)
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or kind == pyarrow.string_view()):
        raise UserError(f"{where}: column {source.column!r} holds {kind}, not text: set sources.column")
    return [raw or b"" for raw in column.cast(pyarrow.large_binary()).to_pylist()]


@contextlib.contextmanager
def _told(where: str, kind: str, cure: str, fault: type[UserError]) -> Iterator[None]:
    """One line for what `datasets`, pyarrow and the hub's client raise, each kinds of their own."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise fault(f"{where}: cannot be read as {kind} ({reason}); {cure}") from None
