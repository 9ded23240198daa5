"""The gradient of one step: what `loop` trains with and `verify` compares."""

from typing import Protocol

import torch
from torch import Tensor

from lamella.data.stream import Batch
from lamella.model.lm import LanguageModel
from lamella.nn.draw import Draw
from lamella.nn.rows import Rows
from lamella.parallel.mesh import Mesh
from lamella.train.clock import Clock
from lamella.train.loss import step_weight, sum_nats
from lamella.train.metrics import Sums


class StepRows(Protocol):
    """Where a step's rows come from: fixed for the step, whoever computes them."""

    def batch(self, step: int, rows: range) -> Batch: ...

    def target_count(self, step: int) -> int: ...


def accumulate_gradients(
    model: LanguageModel, data: StepRows, mesh: Mesh, step: int, seed: int, sums: Sums, clock: Clock
) -> Tensor:
    """Adds this rank's gradients of step `step` to the parameters, micro-batch by micro-batch.

    They are scaled so that their mean over the data group is the gradient of the step's loss. Returns the sum of this
    data rank's token losses, fp64; `sums` takes what the model records, `clock` the time by part.
    """
    layout = mesh.layout
    weight = step_weight(data.target_count(step), layout.data)
    nats = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for numbers in layout.micro_batches(mesh.data_rank):
        batch = data.batch(step, numbers).to(mesh.device)
        clock.mark("data")
        rows = Rows(
            batch.document,
            batch.position,
            draw=Draw(seed, step, torch.arange(numbers.start, numbers.stop, device=mesh.device)),
            loss_scale=layout.data / layout.global_batch_size,
            record=sums.add,
        )
        loss = sum_nats(model, batch, rows)
        clock.mark("forward")
        (loss * weight).backward()
        clock.mark("backward")
        nats += loss.detach()
    return nats
