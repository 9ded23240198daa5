"""Forward and backward over a step's micro-batches, one after the other; `pipeline` has the one that overlaps them."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from lamella.model.lm import LanguageModel
from lamella.nn.rows import Rows


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor
    targets: Tensor
    rows: Rows


Loss = Callable[[Tensor, MicroBatch], Tensor]  # of each target's -log p, [B, T]: a scalar


class Passes(Protocol):
    """Both return the sum of the losses of the last stage's ranks, fp64; elsewhere 0."""

    def train(self, batches: Iterable[MicroBatch], weight: float, mark: Callable[[str], None]) -> Tensor:
        """Adds the gradients of `weight` times the losses to the parameters; `mark(part)` is told where time goes."""
        ...

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor: ...


class Sequential:
    """One stage. `module` is what is called for `model`, `backward` what is called with a loss."""

    def __init__(
        self,
        model: LanguageModel,
        loss: Loss,
        module: Callable[..., Tensor] | None = None,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ):
        self.model, self.loss, self.module, self.backward = model, loss, module or model, backward
        self.device = next(model.parameters()).device

    def train(self, batches: Iterable[MicroBatch], weight: float, mark: Callable[[str], None]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            loss = self._loss(batch)
            mark("forward")
            self.backward(loss * weight)
            mark("backward")
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            total += self._loss(batch)
        return total

    def _loss(self, batch: MicroBatch) -> Tensor:
        return self.loss(self.module(batch.tokens, batch.rows, targets_BT=batch.targets), batch)
