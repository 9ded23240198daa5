"""What one process of `verify` measures: losses, gradients and weights over some steps, and an optimizer's state.

The same code runs the layout in question and the single process it is compared with.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lamella.channels.base import Channel
from lamella.channels.moe.router import Router
from lamella.config import LayoutConfig, RunConfig
from lamella.mixers.base import Mixer
from lamella.model.lm import LanguageModel
from lamella.nn.rows import Rows
from lamella.nn.shard import Box, placed_parameters
from lamella.parallel import mesh as meshes
from lamella.parallel.apply import build_model, make_shard
from lamella.parallel.layout import resolve
from lamella.parallel.mesh import Mesh
from lamella.parallel.zero import Zero
from lamella.train.clock import Clock
from lamella.train.metrics import Sums
from lamella.train.optimizer import make_optimizer
from lamella.train.probe import ProbeRows, given_gradient, perturb
from lamella.train.step import accumulate_gradients

Named = dict[str, Tensor]
MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process holds of the tensors it reports: boxes of each, by parameter name."""

    shapes: dict[str, tuple[int, ...]]
    boxes: dict[str, tuple[Box, ...]]


@dataclasses.dataclass
class Measured:
    """One process's report. `gradients[s]`, `weights[s]` are local tensors by name, after step s."""

    part: Part
    initial: Named
    outputs: list[dict[str, float]]  # by branch, the sum of squares of what it added to the stream over the step's rows
    losses: list[float]
    norms: list[float]
    gradients: list[Named]
    weights: list[Named]
    adam: list[tuple[str, int, Tensor]]  # key/name, start in the flattened local parameter, fragment
    close_calls: list[str]  # routers whose choice hung on a margin below MARGIN


MARGIN = 1e-6


def measure(
    run: RunConfig, layout: LayoutConfig, steps: int, seed: int, rate: tuple[float, float], double: bool = False
) -> Measured:
    """Runs `steps` steps of SGD with momentum at `rate` (learning rate, clipping norm), then one of AdamW.

    `double` is the noise floor's run: fp64, one process, no engine.
    """
    seat = meshes.find_seat()
    mesh = meshes.join(seat, resolve(run.model_copy(update={"layout": layout}), seat.world), timeout=120)
    model = build_model(run.model, mesh, "fp32", seed)
    perturb(model, seed)
    if double:
        model.double()
        model.shard.dtype = torch.float64
    data = ProbeRows(run.model.vocab_size, run.train.sequence_length, seed)
    watch, outputs = CloseCalls(model), Outputs(model)
    report = Measured(_part(model), _weights(model), [], [], [], [], [], [], watch.found)
    update = _sgd_double(model, rate) if double else _sgd(model, rate, mesh)
    for step in range(steps):
        nats = accumulate_gradients(model, data, mesh, step, seed, Sums(), Clock(mesh.device))
        report.losses.append(mesh.sum(nats).item() / mesh.layout.tensor / data.target_count(step))
        report.outputs.append(outputs.take(mesh))
        report.gradients.append(_mean_gradients(model, mesh))
        report.norms.append(update())
        report.weights.append(_weights(model))
    if not double:
        report.adam = _adam(run, mesh, seed)
    meshes.leave()
    return report


def _part(model: LanguageModel) -> Part:
    places = {n: p.place for n, p in placed_parameters(model)}
    return Part({n: p.shape for n, p in places.items()}, {n: p.boxes for n, p in places.items()})


def _weights(model: LanguageModel) -> Named:
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters()}


def _mean_gradients(model: LanguageModel, mesh: Mesh) -> Named:
    """The whole step's gradients: what the engine will see, averaged over the data group."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        torch.distributed.all_reduce(grad, group=mesh.data)
        found[name] = (grad / mesh.layout.data).cpu()
    return found


def _sgd(model: LanguageModel, rate: tuple[float, float], mesh: Mesh):
    zero = Zero(model, SGD(model.parameters(), lr=rate[0], momentum=MOMENTUM), rate[1], mesh)
    return lambda: zero.step(rate[0])


def _sgd_double(model: LanguageModel, rate: tuple[float, float]):
    optimizer = SGD(model.parameters(), lr=rate[0], momentum=MOMENTUM)

    def update() -> float:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), rate[1])
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return update


def _adam(run: RunConfig, mesh: Mesh, seed: int) -> list[tuple[str, int, Tensor]]:
    """Masters and moments after two steps of AdamW from given gradients: the engine's work apart from the model's."""
    model = LanguageModel(run.model, make_shard(run.model, mesh, "fp32")).to(mesh.device)
    perturb(model, seed)
    optimizer = run.train.optimizer
    zero = Zero(model, make_optimizer(model, optimizer), optimizer.clip_norm, mesh)
    for step in range(2):
        for name, parameter in placed_parameters(model):
            parameter.grad = given_gradient(name, parameter.place, step).to(mesh.device)
        zero.step(optimizer.lr)
    return [
        (f"{key}/{name}", start, view.cpu().clone())
        for name, _, start, views in zero.fragments()
        for key, view in views.items()
    ]


class Outputs:
    """Sums the squares of every branch's output, so that the first branch whose forward differs can be named."""

    def __init__(self, model: LanguageModel):
        self.sums: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, (Mixer, Channel)):
                module.register_forward_hook(functools.partial(self._add, name))

    def _add(self, name: str, module: nn.Module, inputs: Any, y: Tensor) -> None:
        square = y.detach().double().square().sum()
        self.sums[name] = self.sums[name] + square if name in self.sums else square

    def take(self, mesh: Mesh) -> dict[str, float]:
        """The sums over all rows since the last call. A tensor group holds replicas, unless split over time."""
        replicas = 1 if mesh.layout.sequence_parallel else mesh.layout.tensor
        total = mesh.sum(torch.stack(list(self.sums.values()))) / replicas
        found = dict(zip(self.sums, total.tolist(), strict=True))
        self.sums = {}
        return found


class CloseCalls:
    """Notes the routers whose k-th and next chance differ by less than MARGIN: rounding may decide there."""

    def __init__(self, model: LanguageModel):
        self.found: list[str] = []
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._look)

    @torch.no_grad()
    def _look(self, router: Router, inputs: tuple[Tensor, Rows], output: Any) -> None:
        k = router.options.top_k
        if k == router.options.num_experts:
            return
        chance = router.logits(*inputs).softmax(-1).topk(k + 1, dim=-1).values
        close = ((chance[..., k - 1] - chance[..., k]) < MARGIN) & inputs[1].real_BT
        if close.any():
            self.found.append(f"{router.place} ({int(close.sum())} tokens)")
