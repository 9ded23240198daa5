"""What a tokenizer is to everything else."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np

PROBES = (
    " ",
    "  a  b ",
    "\n\n\t\tc\r\n\rd ",
    "ﬁ Å e\u0301 ½ \uff21",
    "\0\x01\x7f\x85\u200b\u2028",
    "中文 😀 \u2581 \ud800",
)


class Tokenizer(ABC):
    """Text to ids and back, with an end-of-document id.

    Attributes: vocab_size (ids are 0 <= id < vocab_size), eod (closes each stored document and begins each row's
    documents), unknown (the id of what it cannot spell, -1 where it has none), fingerprint (a digest of all that tells
    its ids), exact (decode undoes encode for every string).
    """

    vocab_size: int
    eod: int
    unknown: int
    fingerprint: str
    exact: bool

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without eod."""
        return self.encode_batch([text])[0].tolist()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """The ids of each text as int32 [tokens], the same for any number of threads."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; eod and other control pieces are silent. Raises IndexError on an id too large.

        Bytes that form no text, as a model under training may emit, become U+FFFD.
        """

    @abstractmethod
    def piece(self, id: int) -> str:
        """The name of an id in the tokenizer's own writing."""

    @staticmethod
    def _spelled(pieces: Iterable[bytes]) -> str:
        raw = b"".join(pieces)
        for errors in ("strict", "surrogatepass"):
            try:
                return raw.decode(errors=errors)
            except UnicodeDecodeError:
                continue
        return raw.decode(errors="replace")

    def _returns_all(self) -> bool:
        """Whether decoding undoes encoding on strings that normalisers, prefixes and missing bytes would change."""
        return all(self.decode(self.encode(p)) == p for p in PROBES)
