"""What a folder of prepared data says about itself, and opening one.

    PATH/manifest.json  tokenizer.model (or what else the tokenizer is)
         NAME/train.bin  train.idx  train.sums  heldout.bin  heldout.idx  heldout.sums     one folder a source

The manifest is written last, into a folder that gets its name only when whole. Opening compares the configuration, the
sizes of all files and the digests of the small ones; it reads no tokens. Those are compared with their sums, block by
block, when they are first touched (blocks.py).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lamella.config import DataConfig, Strict
from lamella.data.store.tokens import TokenFile
from lamella.data.tokenizer import Tokenizer, load, read_model
from lamella.data.tokenizer.model import SENTENCEPIECE
from lamella.errors import UserError

VERSION = 2
SPLITS: tuple[str, ...] = ("train", "heldout")
MANIFEST = "manifest.json"
MODEL = SENTENCEPIECE
PREPARE = "run `lamella data prepare FILE` with the data file that names it"
AGAIN = "prepare it again: `lamella data prepare FILE --force`"


class FileEntry(Strict):
    bytes: int
    sha256: str | None  # None: of a .bin, which its sums cover


class SplitEntry(Strict):
    """Counts of one split. `tokens`: an eod for each document included; `text_bytes`: UTF-8, None where unknown."""

    documents: int
    tokens: int
    text_bytes: int | None


class SourceEntry(Strict):
    origin: int  # which of config.sources
    splits: dict[str, SplitEntry]
    skipped: dict[str, int]  # files and records without a document: empty, not text
    duplicates: int  # documents whose exact text had come before, in this source or an earlier one
    closed: bool  # the files hold each document's eod; else it is added in reading


class Manifest(Strict):
    version: int
    config: DataConfig  # what it was prepared with
    origin: str  # sources.fingerprint at that time
    tokenizer: str  # Tokenizer.fingerprint
    vocab_size: int
    exact: bool  # whether decoding gives back the documents' exact text
    sources: dict[str, SourceEntry]  # by name, in the configuration's order
    files: dict[str, FileEntry]  # by path in the folder, all but the manifest

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens, their split and the tokenizer: two folders with the same one train the same."""
        lines = [f"{name} {entry.sha256}\n" for name, entry in self.files.items() if entry.sha256]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def total(self, split: str) -> SplitEntry:
        """Over all sources."""
        entries = [source.splits[split] for source in self.sources.values()]
        sizes = [e.text_bytes for e in entries if e.text_bytes is not None]
        return SplitEntry(
            documents=sum(e.documents for e in entries),
            tokens=sum(e.tokens for e in entries),
            text_bytes=sum(sizes) if len(sizes) == len(entries) else None,
        )

    @property
    def skipped(self) -> dict[str, int]:
        return {why: sum(s.skipped.get(why, 0) for s in self.sources.values()) for why in ("empty", "not text")}


@dataclass(frozen=True)
class Prepared:
    """`sources`: by source's name and split, in the configuration's order."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    sources: dict[str, dict[str, TokenFile]]


def open_prepared(config: DataConfig) -> Prepared:
    """Opens the folder that `config` names.

    Raises UserError: nothing prepared there; a manifest, index, checksum or tokenizer file that is missing or not what
    was written; tokens of another size; data prepared with another configuration than `config`.
    """
    folder = Path(config.path)
    manifest = read_manifest(folder)
    if changed := differences(manifest.config, config, manifest.tokenizer):
        raise UserError(f"{folder}: prepared with another {'; '.join(changed)}; use that, or {AGAIN}")
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry)
    tokenizer = load(folder)
    if tokenizer.fingerprint != manifest.tokenizer:
        raise UserError(f"{folder}: not the tokenizer that these tokens were made with; restore it, or {AGAIN}")
    sources = {
        name: {split: TokenFile(folder / name / split, eod=None if entry.closed else tokenizer.eod) for split in SPLITS}
        for name, entry in manifest.sources.items()
    }
    return Prepared(folder, manifest, tokenizer, sources)


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError: no manifest, a changed one, or not one that this version reads."""
    file = folder / MANIFEST
    try:
        tree = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if any(folder.glob("*/train.idx")):
            raise UserError(f"{file}: missing; restore it, or {AGAIN}") from None
        raise UserError(f"{folder}: no prepared data here; {PREPARE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged, or cannot be read ({error}); restore it, or {AGAIN}") from None
    version = tree.get("version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version < VERSION:
        raise UserError(f"{file}: format version {version}, this Lamella reads {VERSION}; {AGAIN}")
    if not isinstance(tree, dict) or tree.pop("digest", None) != _digest(tree):
        raise UserError(f"{file}: damaged or edited: its digest is another; restore it, or {AGAIN}")
    try:
        return Manifest.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "JSON"
        raise UserError(f"{file}: of another version of Lamella (at {where}); read it with that, or {AGAIN}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    tree = manifest.model_dump(mode="json")
    (folder / MANIFEST).write_text(json.dumps({"digest": _digest(tree)} | tree, indent=1) + "\n")


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """What the manifest says of these files of a folder."""
    return {
        name: FileEntry(
            bytes=(folder / name).stat().st_size,
            sha256=None if name.endswith(".bin") else _sha256(folder / name),
        )
        for name in names
    }


def differences(old: DataConfig, new: DataConfig, fingerprint: str) -> list[str]:
    """What `new` would prepare otherwise than `old`, one phrase each. `fingerprint` is the tokenizer's of the old data.

    A tokenizer file counts by its content, wherever it lies; the folder's own path and weights do not count.
    """
    changed = []
    if [s.prepared for s in old.sources] != [s.prepared for s in new.sources]:
        changed.append("sources")
    for key in ("heldout", "duplicates"):
        before, now = getattr(old, key), getattr(new, key)
        if before != now:
            changed.append(f"{key} ({before}, not {now})")
    if new.tokenizer.model is not None:
        given = Path(new.tokenizer.model).expanduser()
        moved = not given.exists() and new.tokenizer.model == old.tokenizer.model
        same = moved or read_model(given, new.tokenizer.eod).fingerprint == fingerprint
        if not same and (old.tokenizer.model, old.tokenizer.eod) == (new.tokenizer.model, new.tokenizer.eod):
            changed.append(f"tokenizer.model ({new.tokenizer.model} has changed)")
        elif not same and old.tokenizer.model == new.tokenizer.model:
            changed.append(f"tokenizer.eod ({old.tokenizer.eod}, not {new.tokenizer.eod})")
        elif not same:
            changed.append(f"tokenizer.model ({old.tokenizer.model or 'trained'}, not {new.tokenizer.model})")
    elif old.tokenizer.model is not None:
        changed.append(f"tokenizer.model ({old.tokenizer.model}, not a trained one)")
    else:
        for key in ("vocab_size", "train_megabytes"):
            before, now = getattr(old.tokenizer, key), getattr(new.tokenizer, key)
            if before != now:
                changed.append(f"tokenizer.{key} ({before}, not {now})")
    return changed


def _check_file(file: Path, entry: FileEntry) -> None:
    try:
        found = file.stat().st_size
    except OSError:
        gone = f"its {file.readlink()} is not there" if file.is_symlink() else "missing"
        raise UserError(f"{file}: {gone}; restore it, or {AGAIN}") from None
    if found != entry.bytes:
        why = "truncated or replaced"
        raise UserError(
            f"{file}: has {found:,} bytes, the manifest says {entry.bytes:,}: {why}; restore it, or {AGAIN}"
        )
    if entry.sha256 is not None and _sha256(file) != entry.sha256:
        raise UserError(f"{file}: damaged: not what was prepared (another sha256); restore it, or {AGAIN}")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(tree: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
