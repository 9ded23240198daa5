"""Text to token ids and back, by a sentencepiece model, exactly.

sentencepiece stands for a space by U+2581 and takes UTF-8 only, so a literal U+2581 would come back as a space and a
lone surrogate (JSON may hold one) is refused. Both go around it: their UTF-8 bytes become the model's own byte pieces.
Decoding joins the pieces' bytes itself. With a model that normalises nothing and falls back to bytes (ours do, see
train.py) decode(encode(text)) == text for every Python string; `exact` says whether this model is such a one.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from lamella.data.tokenizer.base import Tokenizer
from lamella.errors import UserError

SPACE = "\u2581"
AROUND = re.compile("([\u2581\ud800-\udfff]+)")
CHUNK = 1024  # characters; merging is a priority queue over the whole string, and twice as fast on short ones


class Sentencepiece(Tokenizer):
    def __init__(self, model: bytes, name: str = "tokenizer"):
        """Raises UserError: not a sentencepiece model, or one without an end piece. `name` is for the message."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._model.vocab_size()
        except (RuntimeError, ValueError):
            raise UserError(f"{name}: not a sentencepiece model") from None
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.eod: int = self._model.eos_id()
        if self.eod < 0:
            raise UserError(f"{name}: has no end piece (eos_id) to part documents with; train it with eos_id >= 0")
        self.unknown: int = self._model.unk_id()
        self._bytes, self._byte_id = self._tables()
        pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        # then cutting behind a newline changes no id; a unigram model is as fast on a whole text
        self._by_line = not any("\n" in p for p in pieces) and not self._is_unigram()
        self.exact = True
        self.exact = len(self._byte_id) == 256 and self._returns_all()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        if not self.exact:
            clean = [t.encode(errors="replace").decode() for t in texts]
            return self._model.encode(clean, out_type="numpy", num_threads=threads)
        cut = [list(self._parts(text)) for text in texts]
        strings = [part for parts in cut for part in parts if isinstance(part, str)]
        ids = iter(self._model.encode(strings, out_type="numpy", num_threads=threads))
        empty = np.empty(0, np.int32)
        return [np.concatenate([empty, *(next(ids) if isinstance(p, str) else p for p in parts)]) for parts in cut]

    def decode(self, ids: Sequence[int]) -> str:
        if not self.exact:
            return self._model.decode([int(i) for i in ids])
        return self._spelled(self._bytes[i] for i in ids)

    def piece(self, id: int) -> str:
        return self._model.id_to_piece(id)

    def _parts(self, text: str) -> Iterator[str | np.ndarray]:
        """Strings for sentencepiece, and ids in between for what goes around it."""
        if _is_plain(text):
            yield from _chunks(text) if self._by_line else (text,)
            return
        for number, part in enumerate(AROUND.split(text)):
            if number % 2:
                raw = part.encode(errors="surrogatepass")
                yield np.array([self._byte_id[b] for b in raw], np.int32)
            elif part:
                yield from _chunks(part) if self._by_line else (part,)

    def _is_unigram(self) -> bool:
        try:
            return bool(self._model.nbest_encode_as_ids("a", 1))
        except RuntimeError:  # only unigram models have other readings
            return False

    def _tables(self) -> tuple[list[bytes], dict[int, int]]:
        """The bytes of each id, and the id of each byte."""
        texts, byte_id = [], {}
        for i in range(self.vocab_size):
            piece = self._model.id_to_piece(i)
            if self._model.is_byte(i):
                byte_id[int(piece[3:5], 16)] = i  # <0x0A>
                texts.append(bytes([int(piece[3:5], 16)]))
            elif self._model.is_control(i):
                texts.append(b"")
            else:
                texts.append(piece.replace(SPACE, " ").encode())
        return texts, byte_id


def _is_plain(text: str) -> bool:
    """Whether nothing in it goes around: far cheaper than to look for what does."""
    try:
        return text.isascii() or (SPACE not in text and bool(text.encode()))
    except UnicodeEncodeError:
        return False


def _chunks(text: str) -> Iterator[str]:
    """Cuts behind newlines into strings of about CHUNK characters; a longer line stays whole."""
    begin = 0
    while len(text) - begin > CHUNK and (end := text.find("\n", begin + CHUNK)) >= 0:
        yield text[begin : end + 1]
        begin = end + 1
    if begin < len(text):
        yield text[begin:]
