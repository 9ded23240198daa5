"""Some documents to what is stored of them: pure work, for any process."""

import hashlib
from dataclasses import dataclass

import numpy as np

from lamella.data.tokenizer import Tokenizer

DIGEST = 16  # bytes of a document's sha256 that tell it from others
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Part:
    """Documents of one split: tokens as bytes one behind the other, int32 [documents] tokens, int64 UTF-8 bytes."""

    tokens: bytes
    lengths: np.ndarray
    text_bytes: np.ndarray
    digests: bytes


@dataclass(frozen=True)
class Encoded:
    parts: tuple[Part, ...]  # by split
    skipped: dict[str, int]


class Encoder:
    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, heldout: float):
        self._tokenizer, self._dtype, self._heldout = tokenizer, dtype, heldout
        self._end = np.array([tokenizer.eod], dtype).tobytes()

    def __call__(self, raws: list[bytes]) -> Encoded:
        """Of contents of files or records: UTF-8, or none."""
        skipped = {"empty": 0, "not text": 0}
        texts, digests, sizes = [], [], []
        for raw in raws:
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                skipped["not text"] += 1
                continue
            if not text:
                skipped["empty"] += 1
                continue
            texts.append(text)
            digests.append(hashlib.sha256(raw).digest())
            sizes.append(len(raw))
        stored = self._tokenizer.encode_batch(texts)
        heldout = [in_heldout(digest, self._heldout) for digest in digests]
        parts = []
        for split in (False, True):
            mine = [number for number, held in enumerate(heldout) if held == split]
            pieces = [raw for number in mine for raw in (stored[number].astype(self._dtype).tobytes(), self._end)]
            parts.append(
                Part(
                    b"".join(pieces),
                    np.array([len(stored[number]) + 1 for number in mine], np.int32),
                    np.array([sizes[number] for number in mine], np.int64),
                    b"".join(digests[number][:DIGEST] for number in mine),
                )
            )
        return Encoded(tuple(parts), skipped)


def in_heldout(digest: bytes, share: float) -> bool:
    """Whether a document with this digest belongs to the held-out split."""
    return int.from_bytes(digest[:8]) < share * 2**64
