"""The loss: a sum over target tokens, divided by the step's count of them, never by a rank's or a micro-batch's."""

import torch
from torch import Tensor

from lamella.nn.shard import Shard


def sum_nats(shard: Shard, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """-log p of every target, summed, fp64, from this rank's columns of the logits; targets below 0 are none."""
    nats_BT = shard.cross_entropy(logits_BTV, targets_BT.clamp(min=0))
    return torch.where(targets_BT >= 0, nats_BT, 0).sum(dtype=torch.float64)


def step_weight(targets: int, data: int) -> float:
    """What one token's loss weighs in backward: the engine then averages the gradients over `data` ranks."""
    return data / targets
