"""Text to token ids and back, by a Hugging Face tokenizer.json, run by the package `tokenizers`.

Text never spells a control piece (one that the file calls special, or the end piece). `tokenizers` would match their
names in text, and can be told not to; but where they also lie in the model's own vocabulary, it may still find them. So
the copy that is run knows them by names that nobody writes, and no merge makes them. No id changes by that.

A byte-level vocabulary is decoded here, byte for byte, and a lone surrogate, which `tokenizers` refuses, goes around it
as its three bytes. With others a lone surrogate becomes `?`.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lamella.data.tokenizer.base import Tokenizer
from lamella.errors import UserError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its own threads do not outlive a fork
import tokenizers

SURROGATES = re.compile("([\ud800-\udfff]+)")
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that byte-level pieces write as such


class HuggingFace(Tokenizer):
    def __init__(self, model: bytes, eod: str, fingerprint: str, name: str = "tokenizer"):
        """Raises UserError: no tokenizer.json, or `eod` is none of its added pieces. `name` is for the message."""
        try:
            tree = json.loads(model)
            names, by_bytes = _hide(tree, eod, fingerprint), _byte_level(tree)
            self._model = tokenizers.Tokenizer.from_str(json.dumps(tree))
        except Exception:  # its own errors are of no narrower class
            raise UserError(f"{name}: not a Hugging Face tokenizer.json, or a damaged one") from None
        if not any(token["content"] == names[eod] for token in tree["added_tokens"]):
            raise UserError(f"{name}: {eod} is none of its added pieces, so it ends no document; set tokenizer.eod")
        ids = self._model.get_vocab(with_added_tokens=True)
        self.fingerprint = fingerprint
        self.vocab_size = 1 + max(ids.values())
        self.eod: int = ids[names[eod]]
        self.unknown = _unknown(tree["model"], ids)
        hidden = [self._model.id_to_token(i) for i in range(self.vocab_size)]
        shown = {new: old for old, new in names.items()}
        self._pieces = [f"<{i}>" if name is None else shown.get(name, name) for i, name in enumerate(hidden)]
        self._control = {i for i, name in enumerate(hidden) if name is None or name in shown}
        self._bytes, self._byte_id = _tables(self._pieces, self._control) if by_bytes else ([], {})
        if self.unknown == self.eod and len(self._byte_id) < 256:
            raise UserError(f"{name}: {eod} also stands for what it cannot spell; set tokenizer.eod to another piece")
        self.exact = len(self._byte_id) == 256
        self.exact = self.exact and self._returns_all()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        if threads <= 1 or len(texts) < 2:
            return self._encode(texts)
        with ThreadPoolExecutor(threads) as pool:
            done = list(pool.map(self._encode, [texts[n::threads] for n in range(threads)]))
        return [done[n % threads][n // threads] for n in range(len(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise IndexError(f"ids are 0 to {self.vocab_size - 1}")
        if not self._bytes:
            return self._model.decode([int(i) for i in ids if i not in self._control], skip_special_tokens=False)
        return self._spelled(self._bytes[i] for i in ids)

    def piece(self, id: int) -> str:
        return self._pieces[id]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not any(not text.isascii() and SURROGATES.search(text) for text in texts):
            return self._plain(texts)
        if not self.exact:
            return self._plain([text.encode(errors="replace").decode() for text in texts])
        cut = [SURROGATES.split(text) for text in texts]
        plain = iter(self._plain([part for parts in cut for part in parts[::2]]))
        return [np.concatenate(list(self._joined(parts, plain))) for parts in cut]

    def _joined(self, parts: list[str], plain: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Every second part is surrogates."""
        for part in parts[1::2]:
            yield next(plain)
            yield np.array([self._byte_id[b] for b in part.encode(errors="surrogatepass")], np.int32)
        yield next(plain)

    def _plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]


def _hide(tree: dict[str, Any], eod: str, secret: str) -> dict[str, str]:
    """Renames the control pieces of a tokenizer.json in place; returns their new names by the old ones.

    Cuts, pads and dropout off, too, and what would be put around a text.
    """
    tree |= {"truncation": None, "padding": None, "post_processor": None}
    model, added = tree["model"], tree.setdefault("added_tokens", [])
    if "dropout" in model:
        model["dropout"] = None
    control = dict.fromkeys([token["content"] for token in added if token.get("special")] + [eod])
    names = {piece: f"{secret} {number}" for number, piece in enumerate(control)}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), *rest] for piece, *rest in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))]
    return names


def _unknown(model: dict[str, Any], ids: dict[str, int]) -> int:
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return ids.get(model.get("unk_token") or "", -1)


def _byte_level(tree: dict[str, Any]) -> bool:
    decoder = tree.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return [step.get("type") for step in steps] == ["ByteLevel"]


def _tables(pieces: list[str], control: set[int]) -> tuple[list[bytes], dict[int, int]]:
    """The bytes of each id of a byte-level vocabulary, and the id of each byte."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    letters = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(others)}
    texts, byte_id = [b""] * len(pieces), {}
    for id, piece in enumerate(pieces):
        if id in control:
            continue
        known = all(letter in letters for letter in piece)  # else an added piece, in plain writing
        texts[id] = bytes(letters[letter] for letter in piece) if known else piece.encode()
        if known and len(piece) == 1:
            byte_id[letters[piece]] = id
    return texts, byte_id
