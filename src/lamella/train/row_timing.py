"""What rows cost on this machine: forward and backward of the run's model on rows of equal documents, timed.

A row of T tokens in documents of n costs T (token + pair n): a line over n, whose two numbers are `train.rows.cost`.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lamella.config import RunConfig, change
from lamella.data.batch import Batch, assemble
from lamella.errors import UserError
from lamella.model.count import count
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.nn.draw import Draw
from lamella.nn.record import Record
from lamella.nn.rows import Rows
from lamella.parallel.allocator import keep_memory
from lamella.parallel.passes import MicroBatch, Sequential
from lamella.train.clock import Clock
from lamella.train.loss import make_loss
from lamella.train.rows import UNIT, row_cost

SECONDS = 8.0  # of timing, unless three rounds take longer
ROUNDS = (3, 21)
HALVINGS = 6  # of the row's length, at most
LEAST = 16  # tokens of a document


@dataclasses.dataclass(frozen=True)
class Timed:
    """Medians of `seconds` for a row in documents of `lengths`. `fit` and `count` are the relative errors of the line
    and of the model's own count, whose unit is taken from the sum of all rows.
    """

    lengths: list[int]
    seconds: list[float]
    token: float
    pair: float
    fit: list[float]
    count: list[float]

    @property
    def words(self) -> str:
        """The override, in times of a token's cost where that is not 0."""
        unit = self.token or self.pair
        return f"train.rows.cost={{token: {self.token / unit:.6g}, pair: {self.pair / unit:.6g}}}"

    def lines(self) -> list[str]:
        heads = f"{'documents of':>14}{'ms a row':>12}{'the line':>10}{'the count':>11}"
        rows = [
            f"{n:>14,}{1000 * t:>12.1f}{fit:>+10.1%}{count:>+11.1%}"
            for n, t, fit, count in zip(self.lengths, self.seconds, self.fit, self.count, strict=True)
        ]
        worst, counted = (max(map(abs, errors)) for errors in (self.fit, self.count))
        return [
            "",
            "forward and backward of a row here, and how far off the fitted line and the model's own count are:",
            heads,
            *rows,
            f"the model's own count is off by at most {counted:.1%}, the line by {worst:.1%}; to use the line:",
            self.words,
        ]


def time_rows(run: RunConfig) -> Timed:
    """Raises UserError where the model does not fit this machine's memory, or its configuration is wrong."""
    _check_memory(run)
    length = run.train.sequence_length
    lengths = _document_lengths(length)
    keep_memory()  # as a run does
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = LanguageModel(run.model)
    initialize(model, run.train.seed)
    model.to(device)
    if run.train.precision == "bf16":
        model.shard.dtype = torch.bfloat16
    passes = Sequential(model, make_loss())
    rng = np.random.default_rng(run.train.seed)
    batches = [_row(rng, run.model.vocab_size, length, n).to(device) for n in lengths]
    taken: list[list[float]] = [[] for _ in lengths]
    begin = time.perf_counter()
    for number in range(ROUNDS[1] + 1):  # the first warms up
        if number > ROUNDS[0] and time.perf_counter() - begin > SECONDS:
            break
        for times, batch in zip(taken, batches, strict=True):
            times.append(_seconds(passes, batch, run))
    seconds = [statistics.median(times[1:]) for times in taken]
    token, pair = fit_line(lengths, seconds, length)
    line = [length * (token + pair * n) for n in lengths]
    cost = row_cost(change(run, train=run.train.model_dump(mode="json") | {"rows": {"cost": None}}))
    counted = [float(cost(np.array([n]))[0]) * (length // n) / UNIT for n in lengths]
    unit = sum(seconds) / sum(counted)
    return Timed(lengths, seconds, token, pair, _errors(line, seconds), _errors([unit * c for c in counted], seconds))


def fit_line(lengths: Sequence[int], seconds: Sequence[float], row: int) -> tuple[float, float]:
    """The token >= 0 and pair >= 0 of row * (token + pair n) with least squares of the relative errors."""
    n, t = np.array(lengths, float), np.array(seconds)
    columns = np.stack([row / t, row * n / t], axis=1)
    token, pair = np.linalg.lstsq(columns, np.ones(len(t)), rcond=None)[0].tolist()
    if token >= 0 and pair >= 0:
        return token, pair
    kept = 1 if token < 0 else 0
    alone = float(columns[:, kept].sum() / (columns[:, kept] ** 2).sum())
    return (0.0, alone) if kept else (alone, 0.0)


def _document_lengths(row: int) -> list[int]:
    """The row's, halved again and again."""
    found = [row]
    while len(found) <= HALVINGS and found[-1] % 2 == 0 and found[-1] // 2 >= LEAST:
        found.append(found[-1] // 2)
    if len(found) < 2:
        raise UserError(
            f"train.sequence_length={row}: rows are timed in halves, quarters, ... of at least {LEAST} tokens; take an"
            " even length"
        )
    return found


def _row(rng: np.random.Generator, vocab_size: int, length: int, n: int) -> Batch:
    pieces = [(0, -1, rng.integers(vocab_size, size=n, dtype=np.int32)) for _ in range(length // n)]
    return assemble([pieces], length, 0, 1)


def _seconds(passes: Sequential, batch: Batch, run: RunConfig) -> float:
    """Processor time, which others on the machine disturb less, or a GPU's own."""
    device, record = batch.tokens.device, Record()
    draw = Draw(run.train.seed, 0, torch.zeros(1, dtype=torch.int64, device=device))
    rows = Rows(batch.document, batch.position, draw, 1.0, record, recompute=run.layout.recompute)
    clock, start = Clock(device), time.process_time()
    passes.train([MicroBatch(batch.tokens, batch.targets, rows)], 1 / batch.targets.numel(), clock.mark)
    seconds = sum(clock.take().values()) if clock.on_gpu else time.process_time() - start
    passes.model.zero_grad(set_to_none=True)
    return seconds


def _errors(found: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a / b - 1 for a, b in zip(found, right, strict=True)]


def _check_memory(run: RunConfig) -> None:
    parameters: Any = count(run.model, run.train.sequence_length).parameters
    wanted, there = 8 * parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > 0.8 * there:
        raise UserError(
            f"--measure: {parameters:,} parameters and their gradients take {wanted / 2**30:.0f} GiB, this machine has"
            f" {there / 2**30:.0f}; measure a run of the same widths with fewer layers"
        )
