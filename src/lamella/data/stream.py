"""Rows of packed documents by their number: no state, so a run resumes anywhere and any rank may ask for any row.

The rows of a run are those of epoch 0, then of epoch 1, and so on; step s trains rows s * G <= r < (s + 1) * G (G rows
a step over all ranks), whoever computes them. A piece of a document has inputs [eod] + ids and targets ids + [eod]; a
later piece of a long document begins with the token before it instead of eod. So each stored token is a target once
an epoch.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch

from lamella.config import DataConfig
from lamella.data.manifest import open_prepared
from lamella.data.pack import Plan, plan_epoch
from lamella.data.tokens import TokenFile

NO_TARGET = -100  # cross_entropy's ignore_index
PADDING = -1
KEPT_PLANS = 2  # this epoch's and the next one's


@dataclass(frozen=True)
class Batch:
    """Four int32 tensors [B, T].

    tokens: ids; eod on padding. targets: the id to predict, -100 on padding. document: 0, 1, ... inside the row, -1 on
    padding. position: 0, 1, ... inside the document; padding counts from 0 too, as if it were one more document.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field).to(device) for field in ("tokens", "targets", "document", "position")))


class TrainRows:
    """The training split's rows, dealt to steps.

    Attributes: tokenizer, vocab_size (of the tokenizer), fingerprint (of the data: see Manifest.fingerprint).
    """

    def __init__(self, config: DataConfig, sequence_length: int, global_batch_size: int, seed: int):
        """Raises UserError as `open_prepared` does."""
        prepared = open_prepared(config)
        self.tokenizer = prepared.tokenizer
        self.vocab_size = prepared.tokenizer.vocab_size
        self.fingerprint = prepared.manifest.fingerprint
        self._stored = prepared.splits["train"]
        self._length, self._per_step, self._seed = sequence_length, global_batch_size, seed
        self._plans: dict[int, Plan] = {}
        self._begins = [0]  # the first row of each epoch known so far, and of the one behind

    def batch(self, step: int, rows: range) -> Batch:
        """Rows 0 <= r < global_batch_size of a step as a Batch [len(rows), T]."""
        assert not rows or (min(rows) >= 0 and max(rows) < self._per_step), f"{rows} of {self._per_step} rows"
        found = [self._find(step * self._per_step + row) for row in rows]
        return _assemble(found, self._length, self._stored, self.tokenizer.eod, len(rows))

    def target_count(self, step: int) -> int:
        """How many tokens the whole step predicts, over all ranks, from the plan alone."""
        row, end, count = step * self._per_step, (step + 1) * self._per_step, 0
        while row < end:
            plan, begin = self._find(row)
            taken = min(plan.num_rows - begin, end - row)
            count += plan.target_count(begin, begin + taken)
            row += taken
        return count

    def _find(self, row: int) -> tuple[Plan, int]:
        """The plan that holds a row of the run, and the row's place in it.

        How many rows an epoch has is known only from its plan: the first look far ahead plans all epochs before it.
        """
        while self._begins[-1] <= row:
            self._begins.append(self._begins[-1] + self._plan(len(self._begins) - 1).num_rows)
        epoch = bisect_right(self._begins, row) - 1
        return self._plan(epoch), row - self._begins[epoch]

    def _plan(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            while len(self._plans) >= KEPT_PLANS:
                del self._plans[min(self._plans)]
            self._plans[epoch] = plan_epoch(self._stored.lengths, self._length, self._seed, epoch)
        return self._plans[epoch]


class HeldoutRows:
    """The held-out split's rows, the same in every run: 0 <= r < num_rows.

    Attributes: num_rows, tokenizer, vocab_size, fingerprint as in TrainRows, and bytes_per_token: UTF-8 bytes of text
    to a stored token, so that bits per byte = nats per target token / ln 2 / bytes_per_token over all rows.
    """

    def __init__(self, config: DataConfig, sequence_length: int):
        """Raises UserError as `open_prepared` does."""
        prepared = open_prepared(config)
        self.tokenizer = prepared.tokenizer
        self.vocab_size = prepared.tokenizer.vocab_size
        self.fingerprint = prepared.manifest.fingerprint
        self._stored = prepared.splits["heldout"]
        self._length = sequence_length
        self._plan = plan_epoch(self._stored.lengths, sequence_length, seed=0, epoch=0)
        self.num_rows = self._plan.num_rows
        split = prepared.manifest.splits["heldout"]
        self.bytes_per_token = split.text_bytes / split.tokens

    def batch(self, rows: range, pad_to: int = 0) -> Batch:
        """Rows as a Batch [len(rows), T], or of `pad_to` rows, those that are missing all padding."""
        self._check(rows)
        found = [(self._plan, row) for row in rows]
        return _assemble(found, self._length, self._stored, self.tokenizer.eod, max(pad_to, len(rows)))

    def target_count(self, rows: range) -> int:
        """How many tokens these rows predict."""
        self._check(rows)
        return sum(self._plan.target_count(row, row + 1) for row in rows)

    def _check(self, rows: range) -> None:
        assert not rows or (min(rows) >= 0 and max(rows) < self.num_rows), f"{rows} of {self.num_rows} rows"


def _assemble(rows: list[tuple[Plan, int]], length: int, stored: TokenFile, eod: int, size: int) -> Batch:
    shape = (size, length)
    tokens = np.full(shape, eod, np.int32)
    targets = np.full(shape, NO_TARGET, np.int32)
    document = np.full(shape, PADDING, np.int32)
    count = np.arange(length, dtype=np.int32)
    position = np.tile(count, (size, 1))
    for b, (plan, row) in enumerate(rows):
        begin = 0
        for number, (source, offset, size) in enumerate(plan.pieces(row)):
            end = begin + size
            ids = stored.read(source, offset, size)
            targets[b, begin:end] = ids
            tokens[b, begin + 1 : end] = ids[:-1]
            if offset:
                tokens[b, begin] = stored.read(source, offset - 1, 1)[0]
            document[b, begin:end] = number
            position[b, begin:end] = count[:size]
            begin = end
        position[b, begin:] = count[: length - begin]
    return Batch(*map(torch.from_numpy, (tokens, targets, document, position)))
