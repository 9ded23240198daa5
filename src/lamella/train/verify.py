"""The promise, proven: a layout's losses, gradients, weights and optimizer state against one process's.

Relative norms tensor by tensor: |layout - one process| / |one process|. A tensor's limit is the larger of the table's
value and 4 times its own noise floor (one process in fp32 against fp64), never above CEILING. Nothing is loosened to
pass.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lamella.config import LayoutConfig, RunConfig, change
from lamella.errors import UserError
from lamella.parallel.layout import resolve
from lamella.parallel.local import Outcome, run_local
from lamella.train.measure import Measured, Named, Part, measure
from lamella.train.probe import ROWS, probe_batch, shrink_run

LIMITS = {"initial": 0.0, "output": 1e-5, "loss": 1e-6, "gradient": 1e-5, "norm": 1e-5, "weight": 1e-5, "adam": 1e-5}
CEILING = 1e-4
MOVE = 0.005  # how far the first step moves the weights, relative to their norm; three steps move them by over 1%
TIMEOUT = 600.0
SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Difference:
    """One compared quantity: of a kind, at a step, of a parameter (or of the whole), with its limit and noise floor."""

    kind: str
    step: int
    name: str
    error: float
    noise: float

    @property
    def limit(self) -> float:
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
    """One process in fp32 and fp64 over the probe's rows of `seed`, and the rate that both ran at."""

    run: RunConfig
    seed: int
    rate: tuple[float, float]
    single: Measured
    double: Measured
    skipped: list[str]  # seeds passed over for a router's close call, and where

    def moved(self) -> float:
        """How far the steps moved the weights, relative to their norm after the first."""
        first, last = self.single.weights[0], self.single.weights[-1]
        return _norm({n: last[n] - first[n] for n in first}) / _norm(first) if len(self.single.weights) > 1 else MOVE


def processes(layout: LayoutConfig) -> int:
    """How many processes `verify` starts for a layout: its tensor size times its data size (1 if it says none)."""
    return layout.tensor * (layout.data or 1)


def make_reference(
    run: RunConfig,
    layouts: list[LayoutConfig],
    steps: int,
    full: bool = False,
    process: Callable[..., Measured] = measure,
) -> Reference:
    """Runs the single process that all of `layouts` are compared with. Raises UserError where the run does not fit.

    `process` is what the started processes run: `measure`, or what a test makes of it.
    """
    tensor = math.lcm(*(layout.tensor for layout in layouts))
    small = probe_batch(run, tensor) if full else shrink_run(run, tensor)
    single = LayoutConfig(micro_batch=ROWS)
    skipped: list[str] = []
    for seed in range(SEEDS):
        first = _values(run_local(1, process, small, single, 1, seed, (1e-30, 0.0), timeout=TIMEOUT))[0]
        norm = first.norms[0]
        rate = (MOVE * _norm(first.weights[0]) / (0.5 * norm), 0.5 * norm)  # clipped to half: the norm counts, too
        one, two = (
            _values(run_local(1, process, small, single, steps, seed, rate, double, timeout=TIMEOUT))[0]
            for double in (False, True)
        )
        close = sorted({*one.close_calls, *two.close_calls})
        if not close:
            return Reference(small, seed, rate, one, two, skipped)
        skipped.append(f"seed {seed}: a top-k margin below 1e-6 in {', '.join(close)}")
    raise UserError(f"no seed of {SEEDS} keeps every top-k choice clear of rounding: {'; '.join(skipped)}")


def compare(
    reference: Reference, layout: LayoutConfig, micro_batches: int, process: Callable[..., Measured] = measure
) -> Report:
    """Runs a layout with so many micro-batches a step and compares it with the reference."""
    world = processes(layout)
    rows = ROWS // (layout.data or 1) // micro_batches
    wanted = change(layout, data=layout.data or 1, micro_batch=max(1, rows))
    resolve(reference.run.model_copy(update={"layout": wanted}), world)
    steps = len(reference.single.losses)
    outcomes = run_local(world, process, reference.run, wanted, steps, reference.seed, reference.rate, timeout=TIMEOUT)
    bad = [f"rank {r} ended with code {o.code}" for r, o in enumerate(outcomes) if o.value is None]
    if bad:
        return Report(wanted, micro_batches, [], "; ".join(bad))
    return Report(wanted, micro_batches, list(_differences(reference, _values(outcomes), wanted)))


def _values(outcomes: list[Outcome]) -> list[Measured]:
    for outcome in outcomes:
        if outcome.value is None:
            raise RuntimeError(f"a process of verify ended with code {outcome.code}; its traceback is above")
    return [outcome.value for outcome in outcomes]


def _differences(reference: Reference, ranks: list[Measured], layout: LayoutConfig) -> Iterator[Difference]:
    one, two = reference.single, reference.double
    parts = [r.part for r in ranks]
    yield from _tensors("initial", 0, parts, [r.initial for r in ranks], one.initial)
    for step in range(len(one.losses)):
        for name, want in one.outputs[step].items():
            yield _number("output", step, ranks[0].outputs[step][name], want, two.outputs[step][name], name)
        for rank in ranks:
            yield _number("loss", step, rank.losses[step], one.losses[step], two.losses[step])
            yield _number("norm", step, rank.norms[step], one.norms[step], two.norms[step])
        for kind in ("gradient", "weight"):
            mine = [getattr(r, kind + "s")[step] for r in ranks]
            yield from _tensors(kind, step, parts, mine, getattr(one, kind + "s")[step], getattr(two, kind + "s")[step])
    yield from _adam_differences(reference, ranks, layout)


def _number(kind: str, step: int, got: float, want: float, exact: float, name: str = "") -> Difference:
    return Difference(kind, step, name, abs(got - want) / abs(want), abs(want - exact) / abs(exact))


def _tensors(
    kind: str, step: int, parts: list[Part], got: list[Named], want: Named, exact: Named | None = None
) -> Iterator[Difference]:
    """Every parameter, assembled from the ranks' boxes; of several ranks that hold the same box the worst counts."""
    for name, whole in want.items():
        noise = 0.0 if exact is None else _relative(whole.double() - exact[name], exact[name])
        error = torch.zeros_like(whole, dtype=torch.float64)
        covered = torch.zeros_like(whole, dtype=torch.bool)
        for part, tensors in zip(parts, got, strict=True):
            for box in part.boxes[name]:
                held = tensors[name][box.local_slices].double() - whole[box.whole_slices]
                place = error[box.whole_slices]
                place.copy_(torch.where(held.abs() > place.abs(), held, place))
                covered[box.whole_slices] = True
        yield Difference(kind, step, name, _relative(error, whole) if covered.all() else math.inf, noise)


def _adam_differences(reference: Reference, ranks: list[Measured], layout: LayoutConfig) -> Iterator[Difference]:
    """The data ranks' fragments joined into local tensors, then compared like any others."""
    want = _join(reference.single.part, [reference.single.adam])
    by_tensor_rank = [ranks[t :: layout.tensor] for t in range(layout.tensor)]
    got = [_join(group[0].part, [r.adam for r in group]) for group in by_tensor_rank]
    parts = [group[0].part for group in by_tensor_rank]
    for key in want:
        yield from _tensors("adam", 1, [_under(p, key) for p in parts], [g[key] for g in got], want[key])


def _under(part: Part, key: str) -> Part:
    return Part({f"{key}/{n}": s for n, s in part.shapes.items()}, {f"{key}/{n}": b for n, b in part.boxes.items()})


def _join(part: Part, ranks: list[list[tuple[str, int, Tensor]]]) -> dict[str, Named]:
    """Per key (master, exp_avg, ...) the local tensors; what no rank holds stays NaN, and so differs."""
    found: dict[str, Named] = {}
    for name, start, fragment in (item for rank in ranks for item in rank):
        key, parameter = name.split("/", 1)
        boxes = part.boxes[parameter]
        shape = [max(b.local[d] + b.size[d] for b in boxes) for d in range(len(boxes[0].size))]
        local = found.setdefault(key, {}).setdefault(name, torch.full(shape, math.nan))
        local.view(-1)[start : start + len(fragment)] = fragment
    return found


def _relative(error: Tensor, whole: Tensor) -> float:
    size = float(whole.double().norm())
    off = float(error.double().norm())
    return off / size if size else (0.0 if off == 0 else math.inf)


def _norm(tensors: Named) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
