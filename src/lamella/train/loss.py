"""The loss: a sum over target tokens, divided by the step's count of them, never by a rank's or a micro-batch's."""

import torch
from torch import Tensor

from lamella.nn.shard import Shard
from lamella.parallel.passes import Loss, MicroBatch


def sum_nats(shard: Shard, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """-log p of every target, summed, fp64, from this rank's columns of the logits; targets below 0 are none."""
    return _nats(shard, logits_BTV, targets_BT).sum(dtype=torch.float64)


def make_loss(shard: Shard, sources: int = 1) -> Loss:
    """`sum_nats` of a micro-batch; where there are several sources, each one's sum is recorded as "source/nats"."""

    def loss(logits_BTV: Tensor, batch: MicroBatch) -> Tensor:
        nats_BT = _nats(shard, logits_BTV, batch.targets)
        rows = batch.rows
        if sources > 1 and rows.record is not None and rows.source_BT is not None:
            each = [nats_BT.detach().where(rows.source_BT == n, 0).sum(dtype=torch.float64) for n in range(sources)]
            rows.record.add("source/nats", torch.stack(each))
        return nats_BT.sum(dtype=torch.float64)

    return loss


def step_weight(targets: int, data: int) -> float:
    """What one token's loss weighs in backward: the engine then averages the gradients over `data` ranks."""
    return data / targets


def _nats(shard: Shard, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    nats_BT = shard.cross_entropy(logits_BTV, targets_BT.clamp(min=0))
    return torch.where(targets_BT >= 0, nats_BT, 0)
