"""Rows of packed documents by their number: no state, so a run resumes anywhere and any rank may ask for any row."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lamella.config import DataConfig
from lamella.data.batch import Batch, Piece, assemble
from lamella.data.damage import Readers, Replacing
from lamella.data.plan import Plan, RowCost, plan_once
from lamella.data.steps import Steps
from lamella.data.store.manifest import Prepared, open_prepared
from lamella.data.store.tokens import TokenFile
from lamella.data.tokenizer import Tokenizer


class TrainRows(Steps):
    """The training split's rows, read.

    Attributes besides those of Steps: tokenizer, vocab_size (of the tokenizer), fingerprint (of the data, see
    Manifest.fingerprint, and the sources' weights).
    """

    def __init__(
        self,
        config: DataConfig,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        window: int = 1,
        cost: RowCost | None = None,
        balanced: bool = True,
        quarantine: Path | None = None,
    ):
        """The arguments of Steps. `quarantine`: the run's folder, where pieces in damaged blocks are to be replaced;
        None: `batch` raises Damaged.

        Raises UserError as `open_prepared`, `Steps` and `Replacing` do.
        """
        prepared = open_prepared(config)
        super().__init__(config, prepared, sequence_length, global_batch_size, seed, window, cost, balanced)
        self.tokenizer = prepared.tokenizer
        self.vocab_size = prepared.tokenizer.vocab_size
        self.fingerprint = prepared.manifest.fingerprint
        if self.weights is not None:
            self.fingerprint += f" {self.weights}"
        files = {name: splits["train"] for name, splits in prepared.sources.items()}
        self._readers = Readers(files) if quarantine is None else Replacing(files, quarantine, seed)
        self._length = sequence_length

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Rows 0 <= r < global_batch_size of a step as a Batch [len(rows), T]."""
        numbers = self.step_rows(step)
        assert all(0 <= row < len(numbers) for row in rows), f"{rows} of {len(numbers)} rows"
        found = [_pieces(*self.plans.find(int(numbers[row])), self._readers) for row in rows]
        return assemble(found, self._length, self.tokenizer.eod, len(rows))


class HeldoutRows:
    """A split's rows, every document once, the same in every run: 0 <= r < num_rows.

    Attributes: num_rows, tokenizer, vocab_size, and bytes_per_token: UTF-8 bytes of text to a stored token, so that
    bits per byte = nats per target token / ln 2 / bytes_per_token over all rows.
    """

    def __init__(self, files: Sequence[TokenFile], tokenizer: Tokenizer, text_bytes: int, sequence_length: int):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self._readers, self._length = Readers({str(n): file for n, file in enumerate(files)}), sequence_length
        self._plan = plan_once([file.lengths for file in files], sequence_length)
        self.num_rows = self._plan.num_rows
        self.bytes_per_token = text_bytes / int(self._plan.targets[-1])

    def batch(self, rows: range, pad_to: int = 0) -> Batch:
        """Rows as a Batch [len(rows), T], or of `pad_to` rows, those that are missing all padding. Raises Damaged."""
        self._check(rows)
        found = [_pieces(self._plan, row, self._readers) for row in rows]
        return assemble(found, self._length, self.tokenizer.eod, max(pad_to, len(rows)))

    def target_count(self, rows: range) -> int:
        """How many tokens these rows predict."""
        self._check(rows)
        return int(np.diff(self._plan.targets)[list(rows)].sum())

    def _check(self, rows: range) -> None:
        assert not rows or (min(rows) >= 0 and max(rows) < self.num_rows), f"{rows} of {self.num_rows} rows"


def split_rows(prepared: Prepared, split: str, sequence_length: int) -> HeldoutRows:
    """All rows of a split of prepared data."""
    text_bytes = prepared.manifest.total(split).text_bytes
    files = [splits[split] for splits in prepared.sources.values()]
    return HeldoutRows(files, prepared.tokenizer, text_bytes or 0, sequence_length)


def heldout_rows(config: DataConfig, sequence_length: int) -> HeldoutRows:
    """Raises UserError as `open_prepared` does."""
    return split_rows(open_prepared(config), "heldout", sequence_length)


def _pieces(plan: Plan, row: int, readers: Readers) -> list[Piece]:
    found = []
    for source, document, offset, length in plan.pieces(row):
        if offset:
            ids = readers.read(source, document, offset - 1, length + 1)
            found.append((source, int(ids[0]), ids[1:]))
        else:
            found.append((source, -1, readers.read(source, document, 0, length)))
    return found
