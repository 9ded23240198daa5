"""The promise, proven: a layout's losses, gradients, weights and optimizer state against one process's.

Relative norms tensor by tensor: |layout - one process| / |one process|. A tensor's limit is the larger of the table's
value and 4 times its own noise floor (one process in fp32 against fp64), never above CEILING. Nothing is loosened to
pass.

In bf16 rounding moves single tensors far, and turns top-k choices. There the layout and one process are both compared
with one process in fp32, and the layout may not be farther from it than BF16 times as far as the one process is: root
mean squares over the tensors of a kind, step by step.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from lamella.config import LayoutConfig, RunConfig, change
from lamella.errors import UserError
from lamella.parallel.layout import resolve
from lamella.parallel.local import Outcome, run_local
from lamella.train.measure import Held, Measured, Precision, measure
from lamella.train.probe import ROWS, probe_batch, shrink_run

LIMITS = {"initial": 0.0, "output": 1e-5, "loss": 1e-6, "gradient": 1e-5, "norm": 1e-5, "weight": 1e-5, "adam": 1e-5}
CEILING = 1e-4
BF16 = 4.0
MOVE = 0.005  # how far the first step moves the weights, relative to their norm; three steps move them by over 1%
TIMEOUT = 600.0
SEEDS = 5

Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One compared quantity: of a kind, at a step, of a parameter (or of the whole), with its limit and noise floor."""

    kind: str
    step: int
    name: str
    error: float
    noise: float
    bf16: bool = False

    @property
    def limit(self) -> float:
        if self.bf16:
            return max(LIMITS[self.kind], BF16 * self.noise)
        return min(CEILING, max(LIMITS[self.kind], 4 * self.noise)) if LIMITS[self.kind] else 0.0

    @property
    def failed(self) -> bool:
        return not self.error <= self.limit  # NaN fails

    def __str__(self) -> str:
        where = f" of {self.name}" if self.name else ""
        return f"{self.kind}{where} at step {self.step}: off by {self.error:.1e}, limit {self.limit:.1e}"


@dataclasses.dataclass(frozen=True)
class Report:
    """A layout's comparison. `crash` says how its processes failed, if they did."""

    layout: LayoutConfig
    micro_batches: int
    differences: list[Difference]
    crash: str = ""

    @property
    def failures(self) -> list[Difference]:
        return [d for d in self.differences if d.failed]

    @property
    def passed(self) -> bool:
        return not self.crash and not self.failures and bool(self.differences)

    @property
    def processes(self) -> int:
        return processes(self.layout)

    def name(self) -> str:
        """The layout's words and its micro-batches."""
        usual = LayoutConfig().model_dump() | {"data": 1}
        drop = {"micro_batch"} | ({"schedule"} if self.layout.pipeline == 1 else set())
        words = {k: v for k, v in self.layout.model_dump().items() if k not in drop and v != usual[k]}
        if self.layout.pipeline > 1:
            words["schedule"] = self.layout.schedule
        name = ",".join(f"{k}={str(v).lower()}" for k, v in words.items()).replace(" ", "") or "one process"
        return f"{name}, {self.micro_batches} micro-batches of {self.layout.micro_batch} rows"

    def worst(self, kind: str) -> Difference:
        return max((d for d in self.differences if d.kind == kind), key=lambda d: d.error)

    def verdict(self) -> str:
        """One line; a failure names the first that differs, in the order of the computation, and the worst."""
        if self.crash or self.passed:
            return self.crash or "equal"
        worst = max(self.failures, key=lambda d: d.error / max(d.limit, 1e-300))
        return f"{len(self.failures)} differ; first {self.failures[0]}; worst {worst}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """One process over the probe's rows of `seed`, at `rate`: as the layouts run, and more exactly, for the noise."""

    run: RunConfig
    seed: int
    rate: tuple[float, float]
    precision: Precision
    single: Measured
    exact: Measured
    skipped: list[str]  # seeds passed over for a router's close call, and where

    def moved(self) -> float:
        """How far the steps moved the weights, relative to their norm after the first."""
        first, last = (_whole(held) for held in (self.single.weights[0], self.single.weights[-1]))
        return _norm({n: last[n] - first[n] for n in first}) / _norm(first) if len(self.single.weights) > 1 else MOVE


def processes(layout: LayoutConfig) -> int:
    """How many processes `verify` starts for a layout that says no data size: the fewest that it allows."""
    return layout.tensor * layout.pipeline * _data(layout)


def _data(layout: LayoutConfig) -> int:
    return layout.data or layout.expert // math.gcd(layout.expert, layout.tensor)


class References:
    """Single processes to compare with: one for all layouts that shrink the run to the same model."""

    def __init__(
        self,
        run: RunConfig,
        steps: int,
        full: bool = False,
        precision: Literal["fp32", "bf16"] = "fp32",
        process: Callable[..., Measured] = measure,
    ):
        """`process` is what the started processes run: `measure`, or what a test makes of it."""
        self.run, self.steps, self.full, self.process = run, steps, full, process
        self.precision: Literal["fp32", "bf16"] = precision
        self.made: dict[str, Reference] = {}

    def of(self, layout: LayoutConfig) -> Reference:
        """Raises UserError where the run does not fit the layout."""
        small = self.shrunk(layout)
        key = small.model_dump_json()
        if key not in self.made:
            self.made[key] = _reference(small, self.steps, self.precision, self.process)
        return self.made[key]

    def shrunk(self, layout: LayoutConfig) -> RunConfig:
        """The run that stands for this one under a layout."""
        return probe_batch(self.run, layout.tensor) if self.full else shrink_run(self.run, layout)


def _reference(
    run: RunConfig, steps: int, precision: Literal["fp32", "bf16"], process: Callable[..., Measured]
) -> Reference:
    single = LayoutConfig(micro_batch=ROWS)
    better: Precision = "fp64" if precision == "fp32" else "fp32"
    skipped: list[str] = []
    for seed in range(SEEDS):
        first = _values(run_local(1, process, run, single, 1, seed, (1e-30, 0.0), timeout=TIMEOUT))[0]
        norm = first.norms[0]
        rate = (MOVE * _norm(_whole(first.weights[0])) / (0.5 * norm), 0.5 * norm)  # clipped to half: the norm counts
        one, two = (
            _values(run_local(1, process, run, single, steps, seed, rate, kind, timeout=TIMEOUT))[0]
            for kind in (precision, better)
        )
        close = sorted({*one.close_calls, *two.close_calls})
        if not close:
            return Reference(run, seed, rate, precision, one, two, skipped)
        skipped.append(f"seed {seed}: a top-k margin below 1e-6 in {', '.join(close)}")
    raise UserError(f"no seed of {SEEDS} keeps every top-k choice clear of rounding: {'; '.join(skipped)}")


def micro_batch_counts(layout: LayoutConfig) -> tuple[int, ...]:
    """How many micro-batches a layout is tried with."""
    return (8,) if layout.pipeline > 1 else (1, 4)


def compare(
    reference: Reference, layout: LayoutConfig, micro_batches: int, process: Callable[..., Measured] = measure
) -> Report:
    """Runs a layout with so many micro-batches a step, or as many as its rows allow, and compares it."""
    world, data = processes(layout), _data(layout)
    wanted = change(layout, data=data, micro_batch=max(1, ROWS // data // micro_batches))
    resolve(reference.run.model_copy(update={"layout": wanted}), world)
    steps, run = len(reference.single.losses), reference.run
    args = (run, wanted, steps, reference.seed, reference.rate, reference.precision)
    outcomes = run_local(world, process, *args, timeout=TIMEOUT)
    bad = [f"rank {r} ended with code {o.code}" for r, o in enumerate(outcomes) if o.value is None]
    count = ROWS // data // wanted.micro_batch
    if bad:
        return Report(wanted, count, [], "; ".join(bad))
    return Report(wanted, count, list(_differences(reference, _values(outcomes))))


def _values(outcomes: list[Outcome]) -> list[Measured]:
    for outcome in outcomes:
        if outcome.value is None:
            raise RuntimeError(f"a process of verify ended with code {outcome.code}; its traceback is above")
    return [outcome.value for outcome in outcomes]


def _differences(reference: Reference, ranks: list[Measured]) -> Iterator[Difference]:
    one, two = reference.single, reference.exact
    if reference.precision == "fp32":
        yield from _compared(one, two, ranks)
        return
    noise = _by_kind(_compared(two, two, [one]))
    for kind, error in _by_kind(_compared(two, two, ranks)).items():
        yield Difference(kind, len(one.losses) - 1, "", error, noise[kind], bf16=True)


def _by_kind(differences: Iterable[Difference]) -> dict[str, float]:
    """The root mean square of the errors of each kind, over tensors and steps."""
    found: dict[str, list[float]] = {}
    for difference in differences:
        found.setdefault(difference.kind, []).append(difference.error)
    return {kind: math.sqrt(sum(e * e for e in errors) / len(errors)) for kind, errors in found.items()}


def _compared(one: Measured, two: Measured, ranks: list[Measured]) -> Iterator[Difference]:
    yield from _tensors("initial", 0, [r.initial for r in ranks], one.initial)
    for step in range(len(one.losses)):
        for name, want in one.outputs[step].items():
            yield _number("output", step, ranks[0].outputs[step][name], want, two.outputs[step][name], name)
        for rank in ranks:
            yield _number("loss", step, rank.losses[step], one.losses[step], two.losses[step])
            yield _number("norm", step, rank.norms[step], one.norms[step], two.norms[step])
        for kind in ("gradient", "weight"):
            got, want, exact = ([getattr(r, kind + "s")[step] for r in measured] for measured in (ranks, [one], [two]))
            yield from _tensors(kind, step, got, want[0], exact[0])
    yield from _tensors("adam", 1, [r.adam for r in ranks], one.adam)


def _number(kind: str, step: int, got: float, want: float, exact: float, name: str = "") -> Difference:
    return Difference(kind, step, name, abs(got - want) / abs(want), abs(want - exact) / abs(exact))


def _tensors(
    kind: str, step: int, ranks: list[Held], want: Held, exact: Held | None = None
) -> Iterator[Difference]:
    """Every tensor, assembled from the ranks' blocks; of several ranks that hold the same block the worst counts."""
    exacts = {} if exact is None else _whole(exact)
    for name, whole in _whole(want).items():
        noise = _relative(whole.double() - exacts[name], exacts[name]) if exacts else 0.0
        error = torch.zeros_like(whole, dtype=torch.float64)
        covered = torch.zeros_like(whole, dtype=torch.bool)
        for offset, block in (piece for held in ranks for piece in held.get(name, [])):
            place = _slices(offset, block)
            off = block.double() - whole[place]
            error[place] = torch.where(off.abs() > error[place].abs(), off, error[place])
            error[place] = torch.where(off.isnan(), off, error[place])
            covered[place] = True
        yield Difference(kind, step, name, _relative(error, whole) if covered.all() else math.inf, noise)


def _whole(held: Held) -> Named:
    """The tensors of a process that holds all of them."""
    found = {}
    for name, blocks in held.items():
        if len(blocks) == 1:
            found[name] = blocks[0][1]
            continue
        dims = range(blocks[0][1].dim())
        shape = [max(offset[d] + block.shape[d] for offset, block in blocks) for d in dims]
        found[name] = torch.full(shape, math.nan, dtype=blocks[0][1].dtype)
        for offset, block in blocks:
            found[name][_slices(offset, block)] = block
    return found


def _slices(offset: tuple[int, ...], block: Tensor) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))


def _relative(error: Tensor, whole: Tensor) -> float:
    size = float(whole.double().norm())
    off = float(error.double().norm())
    return off / size if size else (0.0 if off == 0 else math.inf)


def _norm(tensors: Named) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
