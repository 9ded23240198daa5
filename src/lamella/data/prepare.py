"""Sources to a folder of tokens: `prepare`.

1. Read every document once, to draw the tokenizer's sample from the training split, and train it (skipped when a
   model is given).
2. Read again, encode, write each document to its split. A document's split is decided by the sha256 of its text, so
   copies of one text never straddle the two.
3. Write the manifest and give the folder its name. Until then everything lies in a hidden folder beside it, which the
   next prepare sweeps away if this one is killed.
"""

import glob
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lamella.config import DataConfig
from lamella.data import sources
from lamella.data.manifest import (
    AGAIN,
    MANIFEST,
    MODEL,
    SPLITS,
    VERSION,
    FileEntry,
    Manifest,
    SplitEntry,
    differences,
    open_prepared,
    read_manifest,
)
from lamella.data.tokenizer import Tokenizer, read_model
from lamella.data.tokens import TokenWriter, token_dtype
from lamella.data.vocabulary import Sample, train
from lamella.errors import UserError

BATCH_CHARACTERS = 4_000_000  # encoded at once over all cores
WEEK = 7 * 86_400  # seconds
ASIDE = ".old"  # the suffix of a folder that is being replaced
Progress = Callable[[str, int, int], None]  # phase, documents so far, bytes so far


@dataclass(frozen=True)
class Summary:
    folder: Path
    manifest: Manifest
    already: bool  # nothing to do: prepared before, from the same
    seconds: dict[str, float] = field(default_factory=dict)  # by phase


def prepare(config: DataConfig, progress: Progress | None = None, force: bool = False) -> Summary:
    """Prepares `config.path`, or finds it prepared from the same configuration and unchanged sources.

    Raises UserError, leaving nothing half-written: a source, column or model that is missing or unreadable; no
    document, or none in one of the splits; a target that cannot be written or is no prepared folder; one prepared
    otherwise, without `force`.
    """
    folder = Path(config.path).absolute()
    before = sources.fingerprint(config.sources)
    if _occupied(folder) and not force:
        return Summary(Path(config.path), _unchanged(config, before), already=True)
    clock = _Clock()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = _fresh_work_folder(folder)
        try:
            manifest = _fill(work, config, before, progress or _silent, clock)
            _publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if _occupied(folder) and not force:  # another prepare of the same folder came first
            return Summary(Path(config.path), _unchanged(config, before), already=True)
        raise UserError(f"{config.path}: cannot be written ({error.strerror or error}); choose another path") from None
    return Summary(Path(config.path), manifest, already=False, seconds=clock.seconds)


def in_heldout(digest: bytes, share: float) -> bool:
    """Whether a document with this sha256 belongs to the held-out split."""
    return int.from_bytes(digest[:8]) < share * 2**64


def _fill(work: Path, config: DataConfig, before: str, progress: Progress, clock: "_Clock") -> Manifest:
    """Writes everything into the work folder."""
    model = config.tokenizer.model
    raw = _train_tokenizer(config, progress, clock) if model is None else read_model(model)
    tokenizer = Tokenizer(raw, model or MODEL)
    (work / MODEL).write_bytes(raw)
    digests = {MODEL: tokenizer.fingerprint}
    writers = {split: TokenWriter(work / split, token_dtype(tokenizer.vocab_size)) for split in SPLITS}
    try:
        text_bytes, skipped = _write_tokens(config, tokenizer, writers, progress, clock)
        _check_splits(config, {split: writer.documents for split, writer in writers.items()})
        for writer in writers.values():
            digests |= writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    manifest = Manifest(
        version=VERSION,
        config=config,
        sources=before,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        exact=tokenizer.exact,
        skipped=skipped,
        splits={
            split: SplitEntry(documents=w.documents, tokens=w.tokens, text_bytes=text_bytes[split])
            for split, w in writers.items()
        },
        files={n: FileEntry(bytes=(work / n).stat().st_size, sha256=digest) for n, digest in sorted(digests.items())},
    )
    (work / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    return manifest


def _train_tokenizer(config: DataConfig, progress: Progress, clock: "_Clock") -> bytes:
    """Learns from the training split alone: the held-out text stays unseen."""
    sample = Sample(config.tokenizer.train_megabytes * 1_000_000)
    documents = _zeros()
    size = 0
    with clock("sample"):
        for text, split, num_bytes in _documents(config, {}):
            documents[split] += 1
            size += num_bytes
            if split == "train":
                sample.add(text)
            progress("reading", sum(documents.values()), size)
    _check_splits(config, documents)
    progress("training the tokenizer", sum(documents.values()), size)
    with clock("tokenizer"):
        return train(sample.blocks(), config.tokenizer.vocab_size)


def _write_tokens(
    config: DataConfig,
    tokenizer: Tokenizer,
    writers: dict[str, TokenWriter],
    progress: Progress,
    clock: "_Clock",
) -> tuple[dict[str, int], dict[str, int]]:
    """Encodes all documents; returns the text bytes of each split and the counts of what was skipped."""
    skipped = {"empty": 0, "not text": 0}
    text_bytes = _zeros()
    end = np.array([tokenizer.eod], np.int32)
    threads = os.cpu_count() or 1
    with clock("encode"):
        for batch in _batches(_documents(config, skipped)):
            encoded = tokenizer.encode_batch([text for text, _, _ in batch], threads)
            for ids, (_, split, num_bytes) in zip(encoded, batch, strict=True):
                writers[split].add(np.concatenate([ids, end]))
                text_bytes[split] += num_bytes
            progress("encoding", sum(w.documents for w in writers.values()), sum(text_bytes.values()))
    return text_bytes, skipped


def _documents(config: DataConfig, skipped: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    """Yields text, split and UTF-8 bytes of every document, counting in `skipped` what holds none."""
    for source in config.sources:
        for text in sources.read(source):
            if not text:
                reason = "not text" if text is None else "empty"
                skipped[reason] = skipped.get(reason, 0) + 1
                continue
            raw = text.encode(errors="surrogatepass")
            heldout = in_heldout(hashlib.sha256(raw).digest(), config.heldout)
            yield text, "heldout" if heldout else "train", len(raw)


def _batches(documents: Iterator[tuple[str, str, int]]) -> Iterator[list[tuple[str, str, int]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _zeros() -> dict[str, int]:
    return dict.fromkeys(SPLITS, 0)


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


def _unchanged(config: DataConfig, before: str) -> Manifest:
    """The manifest of what lies there. Raises UserError when it is damaged or was prepared otherwise."""
    manifest = read_manifest(Path(config.path))
    if changed := differences(manifest.config, config, manifest.tokenizer):
        raise UserError(
            f"{config.path}: already prepared with another {'; '.join(changed)}; "
            "choose another path, or replace it with --force"
        )
    if manifest.sources != before:
        raise UserError(f"{config.path}: its sources have changed since it was prepared; keep it, or {AGAIN}")
    return open_prepared(config).manifest


def _fresh_work_folder(folder: Path) -> Path:
    """Makes the hidden folder beside the target, after sweeping away those whose maker is gone."""
    mine = f".{folder.name}.preparing-{socket.gethostname()}-"
    for old in folder.parent.glob(f".{glob.escape(folder.name)}.preparing-*"):
        pid = old.name.removeprefix(mine).removesuffix(ASIDE)
        if old.name.startswith(mine) and pid.isdigit():
            gone = int(pid) == os.getpid() or not _alive(int(pid))
        else:  # another machine's: its process cannot be asked
            gone = time.time() - old.stat().st_mtime > WEEK
        if gone:
            shutil.rmtree(old, ignore_errors=True)
    work = folder.with_name(f"{mine}{os.getpid()}")
    work.mkdir()
    return work


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _publish(work: Path, folder: Path) -> None:
    """Gives the finished folder its name, in place of an older one or an empty one."""
    for file in work.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if (folder / MANIFEST).exists():
        aside = work.with_name(work.name + ASIDE)
        folder.rename(aside)
        work.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        work.rename(folder)


def _silent(phase: str, documents: int, size: int) -> None:
    pass


class _Clock:
    """Adds up the seconds spent under each name: `with clock(name): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> "_Clock":
        self._name, self._begin = name, time.perf_counter()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = self.seconds.get(self._name, 0) + time.perf_counter() - self._begin
