"""The files beside the weights: the tokenizer's, and how to generate. They go both ways as they are."""

import shutil
from pathlib import Path
from typing import Any

from lamella.convert.write import write_json
from lamella.data.manifest import MODEL
from lamella.data.tokenizer import Tokenizer
from lamella.errors import UserError

KEPT = "hf"  # the folder, beside a converted checkpoint, that holds theirs
NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def take_in(source: Path, target: Path) -> str | None:
    """Keeps theirs in target/hf, a sentencepiece model beside it too. Returns the digest of one that we can use."""
    found = [source / name for name in NAMES if (source / name).is_file()]
    if found:
        (target / KEPT).mkdir()
    for file in found:
        shutil.copyfile(file, target / KEPT / file.name)
    digest = fingerprint(target / KEPT)
    if digest is not None:
        shutil.copyfile(target / KEPT / MODEL, target / MODEL)
    return digest


def fingerprint(folder: Path) -> str | None:
    """The digest of the sentencepiece model there, if we can use it."""
    file = folder / MODEL
    if not file.is_file():
        return None
    try:
        return Tokenizer(file.read_bytes(), str(file)).fingerprint
    except UserError:  # tiktoken's, or one without an end piece
        return None


def give_out(run_folder: Path, tokenizer: Path | None, target: Path) -> dict[str, Any]:
    """Theirs as they came; else our tokenizer. Returns what config.json says of it."""
    kept = sorted((run_folder / KEPT).iterdir()) if (run_folder / KEPT).is_dir() else []
    for file in kept:
        shutil.copyfile(file, target / file.name)
    if tokenizer is None:
        return {}
    raw = tokenizer.read_bytes()
    known = Tokenizer(raw, str(tokenizer))
    if not kept:
        (target / MODEL).write_bytes(raw)
        if known.exact:
            write_json(target / "tokenizer_config.json", _as_llama(known))
    return {"bos_token_id": known.eod, "eos_token_id": known.eod}  # it stands before and behind each document


def _as_llama(tokenizer: Tokenizer) -> dict[str, Any]:
    """What makes transformers' tokenizer of sentencepiece models give our ids: it adds and cleans up nothing."""
    eod = tokenizer.piece(tokenizer.eod)
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": eod,
        "eos_token": eod,
        "unk_token": tokenizer.piece(tokenizer.unknown),
    }
