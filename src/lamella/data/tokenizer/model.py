"""A tokenizer as the files that hold it: found, told apart, opened.

A folder stores a sentencepiece model as tokenizer.model. A Hugging Face tokenizer is stored as tokenizer.json and a
tokenizer_config.json that names its end piece; so the folder is one that transformers reads too.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.data.tokenizer.base import Tokenizer
from lamella.errors import UserError

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
FILES = (HUGGING_FACE, SENTENCEPIECE, CONFIG)  # what a folder may store of a tokenizer
TOLD_BY = (CONFIG, "special_tokens_map.json")
KINDS = "a sentencepiece .model, a Hugging Face tokenizer.json, or a folder with one"


@dataclass(frozen=True)
class Model:
    """`files`: by name, all that `read_model` needs to find the same tokenizer in the folder that stores them.

    `name` is for messages. `eod`: the end piece; None with a sentencepiece model, which tells its own.
    """

    name: str
    files: dict[str, bytes]
    eod: str | None = None

    @property
    def fingerprint(self) -> str:
        """Tokenizer.fingerprint before it is opened: sha256 of the .model, or of the tokenizer.json and the end."""
        if HUGGING_FACE not in self.files:
            return hashlib.sha256(self.files[SENTENCEPIECE]).hexdigest()
        return hashlib.sha256(self.files[HUGGING_FACE] + b"\n" + str(self.eod).encode()).hexdigest()

    def open(self) -> Tokenizer:
        """Raises UserError: not a tokenizer, or one without that end piece."""
        if self.eod is not None:
            from lamella.data.tokenizer.hugging_face import HuggingFace

            return HuggingFace(self.files[HUGGING_FACE], self.eod, self.fingerprint, self.name)
        from lamella.data.tokenizer.spm import Sentencepiece

        return Sentencepiece(self.files[SENTENCEPIECE], self.name)

    def write(self, folder: Path) -> None:
        for name, raw in self.files.items():
            (folder / name).write_bytes(raw)


def load(where: Path | str, eod: str | None = None) -> Tokenizer:
    """Raises UserError: as `read_model` and `Model.open`."""
    return read_model(where, eod).open()


def read_model(where: Path | str, eod: str | None = None) -> Model:
    """The tokenizer in a file, or in a folder: tokenizer.json before tokenizer.model, as transformers has it.

    `eod` names the end piece of a tokenizer.json instead of the files beside it. Raises UserError: none there,
    unreadable, no end piece named, or `eod` for a sentencepiece model.
    """
    file = Path(where).expanduser()
    if file.is_dir():
        found = [file / name for name in (HUGGING_FACE, SENTENCEPIECE) if (file / name).is_file()]
        if not found:
            raise UserError(f"{where}: no such tokenizer model; the folder holds no {HUGGING_FACE} or {SENTENCEPIECE}")
        file = found[0]
    raw = _read(file)
    if file.suffix != ".json" and raw[:1] != b"{":
        if eod is not None:
            raise UserError(f"tokenizer.eod={eod}: {where} is a sentencepiece model, which tells its end itself")
        return Model(str(where), {SENTENCEPIECE: raw})
    eod = eod or _told_end(file.parent)
    if eod is None:
        beside = " or ".join(TOLD_BY)
        raise UserError(f"{where}: no {beside} tells its eos_token; set tokenizer.eod{_choice(raw)}")
    return Model(str(where), {HUGGING_FACE: raw, CONFIG: _config(eod)}, eod)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: no such tokenizer model; tokenizer.model is {KINDS}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _told_end(folder: Path) -> str | None:
    """eos_token of the files beside a tokenizer.json: a name, or a mapping with its `content`."""
    for file in (folder / name for name in TOLD_BY if (folder / name).is_file()):
        try:
            tree = json.loads(_read(file))
        except (ValueError, RecursionError):
            raise UserError(f"{file}: damaged: not JSON") from None
        end = tree.get("eos_token") if isinstance(tree, dict) else None
        end = end.get("content") if isinstance(end, dict) else end
        if isinstance(end, str) and end:
            return end
    return None


def _config(eod: str) -> bytes:
    """What makes transformers give our ids: it adds nothing. The end stands before and behind each document."""
    tree: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": eod,
        "eos_token": eod,
    }
    return (json.dumps(tree, indent=2) + "\n").encode()


def _choice(raw: bytes) -> str:
    """Some special pieces of a tokenizer.json, for a message."""
    try:
        names = [token["content"] for token in json.loads(raw)["added_tokens"] if token["special"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f", one of {' '.join(names[:8])}" if names else ""
