"""Sources to a folder of tokens: `prepare`.

1. Read every document once, to draw the tokenizer's sample from the training split, and train it (skipped when a
   tokenizer is given).
2. Read again, encode on all cores, write each document to its source's folder and its split. A document's split is
   decided by the sha256 of its text, so copies of one text never straddle the two.
3. Write the manifest and give the folder its name.

Until then everything lies in a hidden folder beside the target, with a journal: the same call after a kill goes on from
there, to the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lamella.config import DataConfig
from lamella.data import sources
from lamella.data.prepare import journal
from lamella.data.prepare.journal import Journal
from lamella.data.prepare.learn import learn
from lamella.data.prepare.progress import Progress, Report
from lamella.data.prepare.work import Work, sweep
from lamella.data.prepare.write import Writing
from lamella.data.sources.interrupted import Interrupted
from lamella.data.store.manifest import (
    AGAIN,
    MANIFEST,
    SPLITS,
    VERSION,
    Manifest,
    differences,
    file_entries,
    open_prepared,
    read_manifest,
    write_manifest,
)
from lamella.data.tokenizer import Model, load, read_model
from lamella.errors import UserError


@dataclass(frozen=True)
class Summary:
    folder: Path
    manifest: Manifest
    already: bool  # nothing to do: prepared before, from the same
    resumed: bool = False  # went on from where another call was ended
    seconds: dict[str, float] = field(default_factory=dict)  # by phase


def prepare(
    config: DataConfig,
    listener: Callable[[Report], None] | None = None,
    force: bool = False,
    processes: int | None = None,
) -> Summary:
    """Prepares `config.path`, or finds it prepared from the same configuration and unchanged sources.

    The bytes are the same for any number of processes (None: as many as cores).

    Raises UserError, leaving nothing half-written: a source, column or model that is missing or unreadable; no
    document, or none in one of the splits; a target that cannot be written or is no prepared folder; one prepared
    otherwise, without `force`; one that is being prepared by another process.
    """
    folder = Path(config.path).absolute()
    origin = sources.fingerprint(config.sources)
    if _occupied(folder) and not force:
        sweep(folder)
        return Summary(Path(config.path), _unchanged(config, origin), already=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Work(folder) as work:
            if _occupied(folder) and not force:  # another came first
                work.remove()
                return Summary(Path(config.path), _unchanged(config, origin), already=True)
            try:
                return _prepare(config, origin, work, Progress(listener), processes)
            except Interrupted as error:
                raise UserError(f"{error}{_kept(work)}") from None
            except UserError:
                work.remove()
                raise
            except OSError as error:
                raise UserError(f"{_cannot_write(config, error)}{_kept(work)}") from None
    except OSError as error:
        raise UserError(_cannot_write(config, error)) from None


def _prepare(config: DataConfig, origin: str, work: Work, progress: Progress, processes: int | None) -> Summary:
    given = config.tokenizer.model and read_model(config.tokenizer.model, config.tokenizer.eod)
    key = journal.key(config, origin, given.fingerprint if given else None)
    state = journal.load(work.folder, key)
    resumed = state is not None and _tokenizer_there(work.out, state)
    if state is None or not resumed:
        work.clear()
        state = _begin(config, work, progress, given or None, key)
    tokenizer = load(work.out)
    entries = Writing(config, work, tokenizer, progress, state).run(processes)
    documents = {split: sum(e.splits[split].documents for e in entries.values()) for split in SPLITS}
    _check_splits(config, documents)
    progress.phase("writing the manifest")
    files = [f"{name}/{split}.{end}" for name in entries for split in SPLITS for end in ("bin", "idx", "sums")]
    manifest = Manifest(
        version=VERSION,
        config=config,
        origin=origin,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        exact=tokenizer.exact,
        sources=entries,
        files=file_entries(work.out, [*sorted(read_model(work.out).files), *files]),
    )
    write_manifest(work.out, manifest)
    work.publish()
    progress.end()
    return Summary(Path(config.path), manifest, False, resumed, progress.seconds)


def _begin(config: DataConfig, work: Work, progress: Progress, given: Model | None, key: str) -> Journal:
    """The tokenizer in its place, and the first journal."""
    total = sources.text_bytes(config.sources)
    stored = given
    if stored is None:
        stored, documents, total = learn(config, progress, total)
        _check_splits(config, documents)
    stored.open()  # a fault is told before anything is written
    stored.write(work.out)
    for name in stored.files:
        journal.sync(work.out / name)
    journal.sync(work.out)
    state = Journal(key=key, tokenizer=stored.fingerprint, trained=given is None, text_bytes=total)
    journal.save(work.folder, state)
    return state


def _tokenizer_there(out: Path, state: Journal) -> bool:
    try:
        return read_model(out).fingerprint == state.tokenizer
    except UserError:
        return False


def _check_splits(config: DataConfig, documents: dict[str, int]) -> None:
    total = sum(documents.values())
    names = ", ".join(source.path or source.format for source in config.sources)
    if not total:
        raise UserError(f"{names}: no document in these sources (empty ones do not count)")
    for split, count in documents.items():
        if not count:
            cure = "raise heldout" if split == "heldout" else "lower heldout"
            raise UserError(
                f"{names}: none of the {total} documents falls to the {split} split at heldout={config.heldout}; "
                f"{cure}, or add documents"
            )


def _occupied(folder: Path) -> bool:
    """Whether prepared data lies there. Raises UserError on anything else that is in the way."""
    if folder.is_dir():
        if not any(folder.iterdir()):
            return False
        if (folder / MANIFEST).is_file():
            return True
        raise UserError(f"{folder}: a folder with other files in it; choose another path")
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: a file lies where the folder of prepared data should be; choose another path")
    return False


def _unchanged(config: DataConfig, origin: str) -> Manifest:
    """The manifest of what lies there. Raises UserError when it is damaged or was prepared otherwise."""
    manifest = read_manifest(Path(config.path))
    if changed := differences(manifest.config, config, manifest.tokenizer):
        raise UserError(
            f"{config.path}: already prepared with another {'; '.join(changed)}; "
            "choose another path, or replace it with --force"
        )
    if manifest.origin != origin:
        raise UserError(f"{config.path}: its sources have changed since it was prepared; keep it, or {AGAIN}")
    return open_prepared(config).manifest


def _kept(work: Work) -> str:
    """Keeps what is worth it, and says so."""
    state = journal.read(work.folder)
    if state is None or not (state.trained or state.open or state.done):
        work.remove()
        return ""
    return f"; what is done is kept in {work.folder}: the same command goes on from there"


def _cannot_write(config: DataConfig, error: OSError) -> str:
    return f"{config.path}: cannot be written ({error.strerror or error}); make room there, or choose another path"
