"""Trains a tokenizer: an even sample of the documents, then sentencepiece BPE with byte fallback.

The model normalises nothing, so that what it encodes comes back exactly. Runs of spaces may be one piece (indentation),
digits stand alone (numbers get equal treatment at every length), newlines, tabs and rare characters are byte pieces.
The same documents give the same model bytes under one version of sentencepiece.
"""

import hashlib
import heapq
import io
import re
from collections import Counter
from collections.abc import Iterable

import sentencepiece

from lamella.errors import UserError

BLOCK = 4096  # characters; also keeps every "word" under the 65,536 that the trainer can index
EOD_PIECE = "<eod>"
# What the trainer cannot hold inside a sentence: it would skip the whole of it.
BOUNDARY = re.compile("[\n\0\u2581\u2585\ud800-\udfff]+")
COVERAGE = 0.9999  # of the text, by characters that may get a piece
THREADS = 2  # a constant: the number is written into the model file


class Sample:
    """Keeps about `limit` bytes of all blocks added, each block with equal chance, in one pass and bounded memory."""

    def __init__(self, limit: int):
        self._limit, self._bytes, self._documents = limit, 0, 0
        self._kept: list[tuple[int, int, int, str, int]] = []  # a heap, the next to go first

    def add(self, text: str) -> None:
        for number, begin in enumerate(range(0, len(text), BLOCK)):
            block = text[begin : begin + BLOCK]
            size = len(block.encode(errors="replace"))
            place = f"{self._documents} {number}".encode()
            draw = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest())
            heapq.heappush(self._kept, (-draw, self._documents, number, block, size))
            self._bytes += size
            while self._bytes - self._kept[0][-1] >= self._limit:
                self._bytes -= heapq.heappop(self._kept)[-1]
        self._documents += 1

    def blocks(self) -> list[str]:
        """The kept blocks in their first order."""
        return [entry[3] for entry in sorted(self._kept, key=lambda e: e[1:3])]


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """The .model file's bytes. A small corpus yields fewer pieces than asked.

    Raises UserError: no text to learn from.
    """
    lines = _sentences(texts, vocab_size)
    if not lines:
        raise UserError("no text to train a tokenizer on: the sources hold only empty lines; set tokenizer.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        eos_piece=EOD_PIECE,
        max_sentence_length=4 * BLOCK,
        num_threads=THREADS,
        minloglevel=2,
    )
    return model.getvalue()


def _sentences(texts: Iterable[str], vocab_size: int) -> list[str]:
    """Lines, cut also at rare characters, which get no piece: else the trainer fails on a text with more characters
    than pieces (Chinese with a small vocabulary, say). It has an option for that, but only down to 98% of the text.
    """
    blocks = (text[begin : begin + BLOCK] for text in texts for begin in range(0, len(text), BLOCK))
    lines = [line for block in blocks for line in BOUNDARY.split(block) if line]
    if rare := _rare(lines, vocab_size):
        cut = re.compile("[" + re.escape("".join(sorted(rare))) + "]+")
        lines = [part for line in lines for part in cut.split(line) if part]
    return lines


def _rare(lines: list[str], vocab_size: int) -> set[str]:
    """The characters behind 99.99% of the text, and those beyond half of the pieces that are free."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    most = (vocab_size - 258) // 2  # 256 bytes, unknown, end
    total, covered = sum(counts.values()), 0
    rare = set()
    for number, (character, count) in enumerate(sorted(counts.items(), key=lambda c: (-c[1], c[0]))):
        if number >= most or covered >= COVERAGE * total:
            rare.add(character)
        covered += count
    return rare
