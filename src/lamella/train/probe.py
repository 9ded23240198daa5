"""What `verify` runs: the model made small with every kind of layer kept, rows that hide nothing, weights that hide
nothing.

Rows have very unequal target counts, documents of every length, padding; every parameter is perturbed by name (a zero
projection or a norm at 1 would hide a fault); jitter and dropout are on.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lamella.config import LayoutConfig, ModelConfig, RunConfig, change
from lamella.data.batch import Batch
from lamella.data.deal import deal
from lamella.model.init import cut, generator
from lamella.model.stack import plan_layers
from lamella.nn.shard import Place, placed_parameters
from lamella.parallel.layout import stage_count

ROWS = 16
LENGTH = 24


def shrink_run(run: RunConfig, layout: LayoutConfig) -> RunConfig:
    """The run that stands for `run` under a layout: small widths, few repeats, and the probe's batch."""
    model = shrink_model(run.model, layout)
    return probe_batch(change(run, model=model.model_dump(mode="json")), layout.tensor)


def probe_batch(run: RunConfig, tensor: int) -> RunConfig:
    """The run with the probe's rows a step, a length that `tensor` divides, and fp32."""
    length = -(-LENGTH // tensor) * tensor
    train = change(run.train, sequence_length=length, global_batch_size=ROWS, precision="fp32")
    return change(run, train=train.model_dump(mode="json"))


def shrink_model(model: ModelConfig, layout: LayoutConfig) -> ModelConfig:
    """Every part at its smallest and every kind of layer, in their order.

    Each block once, or as often as gives every stage a layer and one of them two; all of it where the layout cuts the
    stack by hand.
    """
    tensor, stages = layout.tensor, stage_count(layout)
    parts = {}
    for plan in {plan.name: plan for plan in plan_layers(model)}.values():
        mixer, channel = plan.name.split("/")
        if plan.mixer is not None:
            parts[mixer] = plan.mixer.shrink(tensor).model_dump(mode="json")
        if plan.channel is not None:
            parts[channel] = plan.channel.shrink(tensor, layout.expert).model_dump(mode="json")
    once = sum(len(block.layers) for block in model.stack)
    repeat = -(-(stages + 1) // once) if stages > 1 else 1
    by_hand = layout.cuts != "auto"
    stack = [change(b, repeat=b.repeat if by_hand else repeat).model_dump(mode="json") for b in model.stack]
    d_model = 16 if 16 % tensor == 0 else 4 * tensor
    return change(
        model, d_model=d_model, vocab_size=32 * tensor, parts=parts, stack=stack, dropout=model.dropout or 0.1
    )


@dataclasses.dataclass(frozen=True)
class ProbeRows:
    """Random tokens in random documents, a pure function of (seed, step, row)."""

    vocab_size: int
    length: int
    seed: int

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        tokens, targets, document, position = map(torch.stack, zip(*(self._row(step, r) for r in rows), strict=True))
        return Batch(tokens, targets, document, position, document.clamp(max=0))

    def target_count(self, step: int) -> int:
        return int(self._targets(step).sum())

    def deal(self, step: int, ranks: int) -> list[list[int]]:
        """As training deals rows, by their targets: so that no rank has its rows in their order."""
        return deal(self._targets(step), ranks).tolist()

    def _targets(self, step: int) -> np.ndarray:
        return np.array([int((self._row(step, r)[1] >= 0).sum()) for r in range(ROWS)])

    def _row(self, step: int, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row 0 has a single real token, so that experts go without; every third row is full."""
        g = generator(f"row/{step}/{row}", self.seed)
        tokens = torch.randint(self.vocab_size, (self.length + 1,), generator=g, dtype=torch.int32)
        real = 1 if row == 0 else self.length if row % 3 == 0 else int(torch.randint(2, self.length, (), generator=g))
        starts = torch.rand(self.length, generator=g) < 0.2
        starts[0] = True
        if real < self.length:
            starts[real] = True
            starts[real + 1 :] = False
        document = (starts.cumsum(0) - 1).int()
        start_at = torch.where(starts, torch.arange(self.length), 0).cummax(0).values
        position = (torch.arange(self.length) - start_at).int()
        targets = tokens[1:].clone()
        targets[real:] = -100
        document[real:] = -1
        return tokens[:-1], targets, document, position


@torch.no_grad()
def perturb(model: nn.Module, seed: int, draw: int = 0) -> None:
    """Matrices normal with std 0.1, well conditioned; the others their initial value plus as much noise.

    Every draw but 0 moves each weight by up to one unit in its last place, as if all had been rounded anew.
    """
    for name, parameter in placed_parameters(model):
        parameter.copy_(cut(_perturbed(name, parameter.place, seed, draw), parameter.place))


def _perturbed(name: str, place: Place, seed: int, draw: int) -> Tensor:
    noise = 0.1 * torch.randn(place.shape, generator=generator(f"perturb/{name}", seed))
    value = noise if place.decay else noise + place.init(generator(name, seed), place.shape)
    if not draw:
        return value
    units = torch.rand(place.shape, generator=generator(f"round/{draw}/{name}", seed)) * 2 - 1
    return value * (1 + units * torch.finfo(torch.float32).eps)


def given_gradient(name: str, place: Place, step: int) -> Tensor:
    """This rank's part of a gradient that every layout is given, to compare the optimizer apart from the model."""
    return cut(torch.randn(place.shape, generator=generator(f"gradient/{step}/{name}", 0)), place)
