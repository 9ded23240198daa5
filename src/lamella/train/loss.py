"""The loss: a sum over target tokens, divided by the step's count of them, never by a rank's or a micro-batch's."""

import torch
from torch import Tensor

from lamella.data.stream import Batch
from lamella.model.lm import LanguageModel
from lamella.nn.rows import Rows


def sum_nats(model: LanguageModel, batch: Batch, rows: Rows) -> Tensor:
    """-log p of every target of the batch, summed, fp64; targets below 0 are none."""
    logits = model(batch.tokens, rows)
    wanted_BT = batch.targets >= 0
    nats_BT = model.shard.cross_entropy(logits, batch.targets.clamp(min=0))
    return torch.where(wanted_BT, nats_BT, 0).sum(dtype=torch.float64)


def step_weight(targets: int, data: int) -> float:
    """What one token's loss weighs in backward: the engine then averages the gradients over `data` ranks."""
    return data / targets
