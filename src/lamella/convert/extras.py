"""The files beside the weights: the tokenizer's, and how to generate. They go both ways as they are."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamella.convert.write import write_json
from lamella.data.tokenizer import Model, Tokenizer, read_model
from lamella.data.tokenizer.model import HUGGING_FACE, SENTENCEPIECE
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
    """Keeps theirs in target/hf, a tokenizer that we can use beside it too. Returns the digest of that one."""
    found = [source / name for name in NAMES if (source / name).is_file()]
    if found:
        (target / KEPT).mkdir()
    for file in found:
        shutil.copyfile(file, target / KEPT / file.name)
    stored = next(_usable(target / KEPT), None)
    if stored is None:
        return None
    stored.write(target)
    return stored.fingerprint


def fingerprints(folder: Path) -> frozenset[str]:
    """The digests of the tokenizers there that we can use: one, or the same as a tokenizer.json and a .model."""
    return frozenset(stored.fingerprint for stored in _usable(folder))


def _usable(folder: Path) -> Iterator[Model]:
    for name in (HUGGING_FACE, SENTENCEPIECE):
        try:
            stored = read_model(folder / name)
            stored.open()
        except UserError:  # not there, tiktoken's, or one that names no end piece
            continue
        yield stored


def give_out(run_folder: Path, tokenizer: Path | None, target: Path) -> dict[str, Any]:
    """Theirs as they came; else our tokenizer, of the folder. Returns what config.json says of it."""
    kept = sorted((run_folder / KEPT).iterdir()) if (run_folder / KEPT).is_dir() else []
    for file in kept:
        shutil.copyfile(file, target / file.name)
    if tokenizer is None:
        return {}
    stored = read_model(tokenizer)
    known = stored.open()
    if not kept:
        stored.write(target)
        if known.exact and SENTENCEPIECE in stored.files:
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
