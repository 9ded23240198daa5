"""Held-out loss in nats a token, and bits per byte: the same for every tokenizer."""

import dataclasses
import math

import torch

from lamella.data.stream import HeldoutRows
from lamella.model.lm import LanguageModel
from lamella.nn.rows import Rows
from lamella.parallel.mesh import Mesh
from lamella.train.loss import sum_nats


@dataclasses.dataclass(frozen=True)
class Evaluation:
    loss: float  # nats a token
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(model: LanguageModel, data: HeldoutRows, mesh: Mesh, limit: int | None = None) -> Evaluation:
    """Over the held-out rows, or their first `limit`, dealt to the data ranks in micro-batches."""
    total = min(limit or data.num_rows, data.num_rows)
    size, layout = mesh.layout.micro_batch, mesh.layout
    pieces = [range(r, min(r + size, total)) for r in range(0, total, size)]
    nats = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for numbers in pieces[mesh.data_rank :: layout.data]:
        batch = data.batch(numbers).to(mesh.device)
        nats += sum_nats(model, batch, Rows(batch.document, batch.position))
    tokens = data.target_count(range(total))
    loss = mesh.sum(nats).item() / layout.tensor / tokens
    return Evaluation(loss, loss / math.log(2) / data.bytes_per_token, tokens)
