"""One layer of each kind and both ends of the model, as one rank of a layout has them, with nobody to talk to.

A forward and backward of it launches every kernel that the rank's part of a step does, with the same widths: the run
warms them up so before any collective waits, and `lamella kernels tune` times them. Parameters and tokens are random.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.config import ModelConfig, RunConfig, change
from lamella.model.lm import LanguageModel
from lamella.nn.draw import Draw
from lamella.nn.record import Record
from lamella.nn.rows import Rows
from lamella.nn.shard import Exchange, Whole
from lamella.parallel.apply import DTYPES, in_pieces
from lamella.parallel.layout import Layout
from lamella.parallel.passes import MicroBatch, Sequential
from lamella.train.loss import make_loss


class _Alone(Exchange):
    """The first of `size` ranks: its own experts see their tokens, the others' outputs are 0."""

    def through(
        self, experts: Callable[[Tensor, Tensor, Tensor], Tensor], x_ND: Tensor, where_N: Tensor, counts_E: Tensor
    ) -> Tensor:
        mine_E = counts_E[: len(counts_E) // self.size]
        count = int(mine_E.sum())
        return F.pad(experts(x_ND[:count], where_N[:count], mine_E), (0, 0, 0, len(x_ND) - count))


def rehearse(run: RunConfig, layout: Layout, device: torch.device) -> None:
    """Forward and backward of a micro-batch, and forward alone."""
    with torch.device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        shard = Whole(DTYPES[run.train.precision], exchange=_Alone(0, layout.expert))
        shard.size = layout.tensor
        shard.pieces = in_pieces(layout, device)
        model = LanguageModel(of_each_kind(run.model), shard)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        batch = _batch(run, layout)
    passes = Sequential(model, make_loss())
    passes.train([batch], 1.0, lambda part: None)
    passes.evaluate([MicroBatch(batch.tokens, batch.targets, Rows(batch.rows.document_BT, batch.rows.position_BT))])
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(run: RunConfig, layout: Layout, device: torch.device) -> None:
    """`rehearse`, one process of a machine first: the others find what it has compiled in Triton's cache.

    Leaves no memory taken.
    """
    with _first():
        rehearse(run, layout, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def of_each_kind(model: ModelConfig) -> ModelConfig:
    words = dict.fromkeys(word for block in model.stack for word in block.layers)
    return change(model, stack=[{"layers": list(words)}])


def _batch(run: RunConfig, layout: Layout) -> MicroBatch:
    """Rows of two documents, one of them of a few tokens."""
    size, length = layout.micro_batch, run.train.sequence_length
    time = torch.arange(length)
    short = min(7, length // 2)
    position_BT = torch.where(time < short, time, time - short).int().expand(size, -1)
    document_BT = (time >= short).int().expand(size, -1)
    vocabulary = run.model.vocab_size // layout.tensor
    tokens_BT, targets_BT = (torch.randint(vocabulary, (size, length), dtype=torch.int32) for _ in range(2))
    draw = Draw(0, 0, torch.arange(size))
    rows = Rows(document_BT, position_BT, draw, loss_scale=1.0, record=Record(), recompute=layout.recompute)
    return MicroBatch(tokens_BT, targets_BT, rows)


@contextlib.contextmanager
def _first() -> Iterator[None]:
    """The first process of this user on this machine goes alone, those that come meanwhile follow together."""
    with (Path(tempfile.gettempdir()) / f"lamella-warm-up-{os.getuid()}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
