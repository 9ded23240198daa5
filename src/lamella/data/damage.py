"""What becomes of a piece that lies in a damaged block: the run stops, or another piece of its length stands in.

The stand-in is as long, so every count, cost and boundary stays, and no rank has to tell another. Which one it is
follows from (seed, source, document, offset) and from which blocks are damaged: every rank, and every resumed run,
finds the same one. What was found and what was replaced goes line by line into the run's `quarantine.jsonl`; the blocks
in it stay out of the run, also where the file has been mended since.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lamella.data.shuffle import draws
from lamella.data.store.blocks import Damaged
from lamella.data.store.tokens import TokenFile
from lamella.errors import UserError

TRIES = 100
FILE = "quarantine.jsonl"


class Readers:
    """Pieces of the documents of some sources, by number. A damaged one raises `Damaged`."""

    def __init__(self, sources: Mapping[str, TokenFile]):
        self.names, self.files = list(sources), list(sources.values())

    def read(self, source: int, document: int, offset: int, length: int) -> np.ndarray:
        return self.files[source].read(document, offset, length)


class Replacing(Readers):
    """The same with stand-ins for damaged pieces, told in the run's folder."""

    def __init__(self, sources: Mapping[str, TokenFile], folder: Path, seed: int):
        """Takes over what `folder` has in quarantine. Raises UserError where that file is damaged."""
        super().__init__(sources)
        self._file, self._seed = folder / FILE, seed
        self._known: set[tuple[str, int]] = set()
        self._longer = cache(lambda source, length: np.flatnonzero(self.files[source].lengths >= length))
        for number, line in enumerate(self._lines(), 1):
            try:
                entry = json.loads(line)
                if "block" in entry:
                    self._known.add((entry["source"], entry["block"]))
                    self.files[self.names.index(entry["source"])].quarantine(entry["block"])
            except (ValueError, KeyError, TypeError, IndexError):
                raise UserError(f"{self._file}: line {number} is none of ours; mend or remove that line") from None

    def read(self, source: int, document: int, offset: int, length: int) -> np.ndarray:
        try:
            return super().read(source, document, offset, length)
        except Damaged as damaged:
            self._note(source, damaged)
            return self._stand_in(source, document, offset, length, damaged)

    def _stand_in(self, source: int, document: int, offset: int, length: int, damaged: Damaged) -> np.ndarray:
        longer = self._longer(source, length)
        words = draws(np.arange(2 * TRIES, dtype=np.uint64), self._seed, source, document, offset)
        for place, number in words.reshape(TRIES, 2).tolist():
            other = int(longer[place % len(longer)])
            begin = number % (int(self.files[source].lengths[other]) // length) * length
            try:
                found = super().read(source, other, begin, length)
            except Damaged as more:
                self._note(source, more)
                continue
            self._write(
                {
                    "source": self.names[source],
                    "document": document,
                    "offset": offset,
                    "length": length,
                    "replaced_by": [other, begin],
                }
            )
            return found
        raise damaged

    def _note(self, source: int, damaged: Damaged) -> None:
        name = self.names[source]
        if (name, damaged.block) in self._known:
            return
        self._known.add((name, damaged.block))
        self._write(
            {
                "source": name,
                "block": damaged.block,
                "file": str(damaged.file),
                "bytes": [damaged.begin, damaged.end],
                "documents": [damaged.documents.start, damaged.documents.stop],
            }
        )

    def _lines(self) -> list[str]:
        try:
            return self._file.read_text().splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._file}: cannot be read ({error}); mend or remove it") from None

    def _write(self, entry: dict[str, Any]) -> None:
        """One write of one line: other ranks append to the same file."""
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
