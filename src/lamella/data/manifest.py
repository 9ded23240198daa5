"""What a folder of prepared data says about itself, and opening one.

    PATH/manifest.json  tokenizer.model  train.bin  train.idx  heldout.bin  heldout.idx

The manifest is written last, into a folder that gets its name only when whole. Opening compares sizes, the tokenizer's
digest and the configuration; it reads no tokens, so it costs the same for any corpus.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lamella.config import DataConfig, Strict
from lamella.data.tokenizer import Tokenizer, read_model
from lamella.data.tokens import TokenFile
from lamella.errors import UserError

VERSION = 1
SPLITS: tuple[str, ...] = ("train", "heldout")
MODEL = "tokenizer.model"
MANIFEST = "manifest.json"
PREPARE = "run `lamella data prepare FILE` with the data file that names it"
AGAIN = "prepare it again: `lamella data prepare FILE --force`"


class FileEntry(Strict):
    bytes: int
    sha256: str


class SplitEntry(Strict):
    """Counts of one split. `tokens` are stored ones, an eod for each document included; `text_bytes` is UTF-8."""

    documents: int
    tokens: int
    text_bytes: int


class Manifest(Strict):
    version: int
    config: DataConfig  # what it was prepared with
    sources: str  # sources.fingerprint at that time
    tokenizer: str  # Tokenizer.fingerprint
    vocab_size: int
    exact: bool  # whether decoding gives back the documents' exact text
    skipped: dict[str, int]  # files and records without a document: empty, not text
    splits: dict[str, SplitEntry]
    files: dict[str, FileEntry]  # by name, all but the manifest

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens, their split and the tokenizer: two folders with the same one train the same."""
        lines = [f"{name} {entry.sha256}\n" for name, entry in sorted(self.files.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    splits: dict[str, TokenFile]


def open_prepared(config: DataConfig) -> Prepared:
    """Opens the folder that `config` names.

    Raises UserError: nothing prepared there, a file missing or of another size, another tokenizer, or data prepared
    with another configuration than `config`.
    """
    folder = Path(config.path)
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_size(folder / name, entry.bytes)
    if changed := differences(manifest.config, config, manifest.tokenizer):
        raise UserError(f"{folder}: prepared with another {'; '.join(changed)}; use that, or {AGAIN}")
    tokenizer = Tokenizer.load(folder / MODEL)
    if tokenizer.fingerprint != manifest.tokenizer:
        raise UserError(f"{folder / MODEL}: not the tokenizer that these tokens were made with; restore it, or {AGAIN}")
    return Prepared(folder, manifest, tokenizer, {split: TokenFile(folder / split) for split in SPLITS})


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError: no manifest, or not one that this version reads."""
    file = folder / MANIFEST
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no prepared data here; {PREPARE}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "JSON"
        raise UserError(f"{file}: damaged or of another version (at {where}); {AGAIN}") from None
    if manifest.version != VERSION:
        raise UserError(f"{file}: format version {manifest.version}, this Lamella reads {VERSION}; {AGAIN}")
    return manifest


def differences(old: DataConfig, new: DataConfig, fingerprint: str) -> list[str]:
    """What `new` would prepare otherwise than `old`, one phrase each. `fingerprint` is the tokenizer's of the old data.

    A tokenizer file counts by its content, wherever it lies; the folder's own path does not count.
    """
    changed = []
    if old.sources != new.sources:
        changed.append("sources")
    if old.heldout != new.heldout:
        changed.append(f"heldout ({old.heldout}, not {new.heldout})")
    if new.tokenizer.model is not None:
        given = Path(new.tokenizer.model).expanduser()
        moved = not given.is_file() and new.tokenizer.model == old.tokenizer.model
        if not moved and hashlib.sha256(read_model(given)).hexdigest() != fingerprint:
            changed.append(f"tokenizer.model ({old.tokenizer.model or 'trained'}, not {new.tokenizer.model})")
    elif old.tokenizer.model is not None:
        changed.append(f"tokenizer.model ({old.tokenizer.model}, not a trained one)")
    else:
        for key in ("vocab_size", "train_megabytes"):
            before, now = getattr(old.tokenizer, key), getattr(new.tokenizer, key)
            if before != now:
                changed.append(f"tokenizer.{key} ({before}, not {now})")
    return changed


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat().st_size
    except OSError:
        raise UserError(f"{file}: missing; {AGAIN}") from None
    if found != size:
        raise UserError(f"{file}: has {found:,} bytes, the manifest says {size:,}: truncated or replaced; {AGAIN}")
