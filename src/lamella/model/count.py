"""Parameters and FLOPs from the configuration alone: the model is laid out on the meta device, nothing is allocated."""

import dataclasses
import math

import torch

from lamella.config import ModelConfig
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from lamella.nn.flops import Flops
from lamella.nn.shard import placed_parameters


@dataclasses.dataclass(frozen=True)
class Count:
    """`parameters` of the whole model, `active` those that one token uses, `forward` work of one row."""

    parameters: int
    active: int
    forward: Flops

    @property
    def training_flops(self) -> float:
        """Forward and backward of one row: backward is twice the forward."""
        return 3 * self.forward.total


def count(config: ModelConfig, length: int) -> Count:
    """Counts for rows that are one document of `length` tokens. Raises UserError where the configuration is wrong."""
    with torch.device("meta"):
        places = [p.place for _, p in placed_parameters(LanguageModel(config))]
    forward = Flops(matmul=2 * length * config.d_model * config.vocab_size)  # the head
    for plan in plan_layers(config):
        forward = forward + plan.flops(config.d_model, length)
    sizes = [math.prod(p.shape) for p in places]
    active = sum(round(n * p.active) for n, p in zip(sizes, places, strict=True))
    return Count(sum(sizes), active, forward)
