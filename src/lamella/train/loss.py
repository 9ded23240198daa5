"""The loss: a sum over target tokens, divided by the step's count of them, never by a rank's or a micro-batch's."""

import torch
from torch import Tensor

from lamella.parallel.passes import Loss, MicroBatch


def sum_nats(nats_BT: Tensor) -> Tensor:
    """In fp64."""
    return nats_BT.sum(dtype=torch.float64)


def make_loss(sources: int = 1) -> Loss:
    """`sum_nats` of a micro-batch; where there are several sources, each one's sum is recorded as "source/nats"."""

    def loss(nats_BT: Tensor, batch: MicroBatch) -> Tensor:
        rows = batch.rows
        if sources > 1 and rows.record is not None and rows.source_BT is not None:
            each = [sum_nats(nats_BT.detach().where(rows.source_BT == n, 0)) for n in range(sources)]
            rows.record.add("source/nats", torch.stack(each))
        return sum_nats(nats_BT)

    return loss


def step_weight(targets: int, data: int) -> float:
    """What one token's loss weighs in backward: the engine then averages the gradients over `data` ranks."""
    return data / targets
