"""Held-out loss in nats a token, and bits per byte: the same for every tokenizer."""

import dataclasses
import math
from collections.abc import Iterator

from lamella.data.stream import HeldoutRows
from lamella.nn.rows import Rows
from lamella.parallel.mesh import Mesh
from lamella.parallel.passes import MicroBatch, Passes


@dataclasses.dataclass(frozen=True)
class Evaluation:
    loss: float  # nats a token
    bits_per_byte: float
    tokens: int


def evaluate(passes: Passes, data: HeldoutRows, mesh: Mesh, limit: int | None = None) -> Evaluation:
    """Over the held-out rows, or their first `limit`, dealt to the data ranks in micro-batches."""
    total = min(limit or data.num_rows, data.num_rows)
    nats = passes.evaluate(_micro_batches(data, mesh, total))
    tokens = data.target_count(range(total))
    loss = mesh.sum(nats).item() / mesh.layout.tensor / tokens
    return Evaluation(loss, loss / math.log(2) / data.bytes_per_token, tokens)


def _micro_batches(data: HeldoutRows, mesh: Mesh, total: int) -> Iterator[MicroBatch]:
    """As many for every rank, which may meet in collectives. Missing rows are padding."""
    size, ranks = mesh.layout.micro_batch, mesh.layout.data
    for number in range(-(-total // (size * ranks))):
        first = (number * ranks + mesh.data_rank) * size
        batch = data.batch(range(min(first, total), min(first + size, total)), pad_to=size).to(mesh.device)
        yield MicroBatch(batch.tokens, batch.targets, Rows(batch.document, batch.position))
