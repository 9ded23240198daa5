"""What one process of `verify` measures: losses, gradients and weights over some steps, and an optimizer's state.

The same code runs the layout in question and the single process it is compared with.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lamella.channels.base import Channel
from lamella.channels.moe.router import Router
from lamella.checkpoint.boxes import pieces
from lamella.config import LayoutConfig, RunConfig
from lamella.mixers.base import Mixer
from lamella.model.lm import LanguageModel
from lamella.nn.record import Record
from lamella.nn.rows import Rows
from lamella.nn.shard import Place, placed_parameters
from lamella.parallel import mesh as meshes
from lamella.parallel.apply import build_model, lay_out, make_passes
from lamella.parallel.layout import resolve
from lamella.parallel.mesh import Mesh
from lamella.parallel.passes import Passes, Sequential
from lamella.parallel.seat import find_seat
from lamella.parallel.zero import Zero
from lamella.train.balance import Balance
from lamella.train.clock import Clock
from lamella.train.feed import Feed
from lamella.train.held import Held
from lamella.train.loss import make_loss
from lamella.train.metrics import Totals
from lamella.train.optimizer import make_optimizer
from lamella.train.probe import ProbeRows, given_gradient, perturb
from lamella.train.step import accumulate_gradients

Precision = Literal["fp32", "fp64", "bf16"]
MOMENTUM = 0.9
MARGIN = 1e-6


@dataclasses.dataclass
class Measured:
    """One process's report; `gradients[s]`, `weights[s]` after step s."""

    initial: Held
    outputs: list[dict[str, float]]  # by branch, the sum of squares of what it added to the stream over the step's rows
    losses: list[float]
    norms: list[float]
    gradients: list[Held]
    weights: list[Held]
    adam: Held  # key/name
    close_calls: list[str]  # routers whose choice hung on a margin below MARGIN


def measure(
    run: RunConfig,
    layout: LayoutConfig,
    steps: int,
    seed: int,
    rate: tuple[float, float],
    precision: Precision = "fp32",
    draw: int = 0,
) -> Measured:
    """Runs `steps` steps of SGD with momentum at `rate` (learning rate, clipping norm), then two of AdamW.

    In fp64, what the noise floor is measured from, there is one process and no engine. `draw` is `perturb`'s.
    """
    seat = find_seat()
    mesh = meshes.join(seat, resolve(run.model_copy(update={"layout": layout}), seat.world), timeout=120)
    model = build_model(run.model, mesh, "bf16" if precision == "bf16" else "fp32", seed)
    perturb(model, seed, draw)
    data = Feed(ProbeRows(run.model.vocab_size, run.train.sequence_length, seed), mesh)
    watch = CloseCalls(model)
    watch_outputs(model)
    optimizer = SGD(model.parameters(), lr=rate[0], momentum=MOMENTUM)
    stepper = _Double(model, optimizer, rate) if precision == "fp64" else _Engine(run, model, optimizer, rate, mesh)
    totals, balance = Totals(mesh), Balance(run.model, model)
    report = Measured(_boxed(stepper.parameters()), [], [], [], [], [], {}, watch.found)
    for step in range(steps):
        record = Record()
        nats = accumulate_gradients(stepper.passes, data, mesh, step, seed, record, Clock(mesh.device))
        report.losses.append(mesh.sum(nats.clone()).item() / mesh.layout.tensor / data.target_count(step))
        total = totals.sum(record.values)
        balance.update(total)
        report.outputs.append(_outputs(total, mesh))
        report.gradients.append(_boxed(stepper.gradients()))
        report.norms.append(stepper.step())
        report.weights.append(_boxed(stepper.parameters()))
    if precision != "fp64":
        report.adam = _adam(run, mesh, seed)
    meshes.leave()
    return report


class _Engine:
    """Steps as training takes them."""

    def __init__(
        self, run: RunConfig, model: LanguageModel, optimizer: SGD, rate: tuple[float, float], mesh: Mesh
    ):
        zero = Zero(model, optimizer, rate[1], mesh)
        loss = make_loss()
        self.passes: Passes = make_passes(model, zero, loss, mesh, run.train.sequence_length)
        self.parameters, self.gradients = zero.parameters, zero.gradients
        self.step: Callable[[], float] = lambda: zero.step(rate[0])


class _Double:
    """The same in fp64, by torch alone."""

    def __init__(self, model: LanguageModel, optimizer: SGD, rate: tuple[float, float]):
        model.double()
        model.shard.dtype = torch.float64
        self.model, self.optimizer, self.rate = model, optimizer, rate
        self.passes: Passes = Sequential(model, make_loss())

    def parameters(self) -> Iterable[tuple[str, Place, Tensor]]:
        return [(n, p.place, p.detach().clone()) for n, p in placed_parameters(self.model)]

    def gradients(self) -> Iterable[tuple[str, Place, Tensor]]:
        found = [(n, p.place, p.grad) for n, p in placed_parameters(self.model)]
        return [(n, place, grad.clone()) for n, place, grad in found if grad is not None]

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.rate[1])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def _boxed(tensors: Iterable[tuple[str, Place, Tensor]]) -> Held:
    return {n: [(b.whole, t[b.local_slices].cpu()) for b in place.boxes] for n, place, t in tensors}


def _outputs(totals: dict[str, Tensor], mesh: Mesh) -> dict[str, float]:
    """Branch outputs are replicas over a tensor group, unless split over time."""
    times = mesh.layout.tensor if mesh.layout.sequence_parallel else 1
    return {n.removeprefix(OUTPUT): times * float(v) for n, v in totals.items() if n.startswith(OUTPUT)}


def _adam(run: RunConfig, mesh: Mesh, seed: int) -> Held:
    """Masters and moments after two steps of AdamW from given gradients: the engine's work apart from the model's."""
    model = lay_out(run.model, mesh, "fp32").to(mesh.device)
    perturb(model, seed)
    optimizer = run.train.optimizer
    zero = Zero(model, make_optimizer(model, optimizer), optimizer.clip_norm, mesh)
    for step in range(2):
        zero.give(functools.partial(given_gradient, step=step))
        zero.step(optimizer.lr)
    return {
        f"{key}/{name}": [
            (at, t.cpu().clone()) for at, t in pieces(v, parameter.place.local_shape, start, parameter.place.boxes)
        ]
        for name, parameter, start, views in zero.fragments()
        for key, v in views.items()
    }


OUTPUT = "output/"


def watch_outputs(model: LanguageModel) -> None:
    """Records the squares of every branch's output, so that the first branch whose forward differs can be named."""

    def look(name: str, module: nn.Module, inputs: Any, y: Tensor) -> None:
        record = inputs[1].record
        if record is not None:
            record.add(OUTPUT + name, y.detach().double().square().sum())

    for name, module in model.named_modules():
        if isinstance(module, (Mixer, Channel)):
            module.register_forward_hook(functools.partial(look, name))


class CloseCalls:
    """Notes the routers that chose by less than MARGIN: rounding may decide there."""

    def __init__(self, model: LanguageModel):
        self.found: list[str] = []
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._look)

    def _look(self, router: Router, inputs: tuple[Tensor, Rows], output: Any) -> None:
        close = int((router.margin(*inputs) < MARGIN).sum())
        if close:
            self.found.append(f"{router.place} ({close} choices)")
