"""The promise, proven: a layout's losses, gradients, weights and optimizer state against one process's.

Relative norms tensor by tensor: |layout - one process| / |one process|. A tensor's limit is the larger of the table's
value and 4 times its own noise floor (train/reference.py), never above CEILING. Nothing is loosened to pass.

In bf16 rounding moves single tensors far, and turns top-k choices. There the layout and one process are both compared
with one process in fp32, and the layout may not be farther from it than BF16 times as far as the one process is: root
mean squares over the tensors of a kind, step by step.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from lamella.config import LayoutConfig, change
from lamella.parallel.layout import resolve
from lamella.parallel.local import run_local
from lamella.train.held import Held, relative, slices, whole
from lamella.train.measure import Measured, measure
from lamella.train.probe import ROWS
from lamella.train.reference import TIMEOUT, Process, Reference, values

LIMITS = {"initial": 0.0, "output": 1e-5, "loss": 1e-6, "gradient": 1e-5, "norm": 1e-5, "weight": 1e-5, "adam": 1e-5}
CEILING = 1e-4
BF16 = 4.0


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


def processes(layout: LayoutConfig) -> int:
    """How many processes `verify` starts for a layout that says no data size: the fewest that it allows."""
    return layout.tensor * layout.pipeline * _data(layout)


def _data(layout: LayoutConfig) -> int:
    return layout.data or layout.expert // math.gcd(layout.expert, layout.tensor)


def micro_batch_counts(layout: LayoutConfig) -> tuple[int, ...]:
    """How many micro-batches a layout is tried with."""
    return (8,) if layout.pipeline > 1 else (1, 4)


def compare(
    reference: Reference, layout: LayoutConfig, micro_batches: int, process: Process = measure
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
    return Report(wanted, count, list(_differences(reference, values(outcomes))))


def _differences(reference: Reference, ranks: list[Measured]) -> Iterator[Difference]:
    one, two = reference.single, reference.exact
    if reference.precision == "fp32":
        yield from _compared(one, [one, *reference.others], two, ranks)
        return
    noise = _by_kind(_compared(two, [two], two, [one]))
    for kind, error in _by_kind(_compared(two, [two], two, ranks)).items():
        yield Difference(kind, len(one.losses) - 1, "", error, noise[kind], bf16=True)


def _by_kind(differences: Iterable[Difference]) -> dict[str, float]:
    """The root mean square of the errors of each kind, over tensors and steps."""
    found: dict[str, list[float]] = {}
    for difference in differences:
        found.setdefault(difference.kind, []).append(difference.error)
    return {kind: math.sqrt(sum(e * e for e in errors) / len(errors)) for kind, errors in found.items()}


def _compared(one: Measured, draws: list[Measured], two: Measured, ranks: list[Measured]) -> Iterator[Difference]:
    yield from _tensors("initial", 0, [r.initial for r in ranks], one.initial)
    for step in range(len(one.losses)):
        for name, want in one.outputs[step].items():
            some, exact = [d.outputs[step][name] for d in draws], two.outputs[step][name]
            yield _number("output", step, ranks[0].outputs[step][name], want, some, exact, name)
        for rank in ranks:
            some = [d.losses[step] for d in draws]
            yield _number("loss", step, rank.losses[step], one.losses[step], some, two.losses[step])
            some = [d.norms[step] for d in draws]
            yield _number("norm", step, rank.norms[step], one.norms[step], some, two.norms[step])
        for kind in ("gradients", "weights"):
            got, want, some, exact = (
                [getattr(m, kind)[step] for m in measured] for measured in (ranks, [one], draws, [two])
            )
            yield from _tensors(kind.removesuffix("s"), step, got, want[0], some, exact[0])
    yield from _tensors("adam", 1, [r.adam for r in ranks], one.adam)


def _number(
    kind: str, step: int, got: float, want: float, draws: list[float], exact: float, name: str = ""
) -> Difference:
    noise = max(abs(drawn - exact) / abs(exact) for drawn in draws)
    return Difference(kind, step, name, abs(got - want) / abs(want), noise)


def _tensors(
    kind: str, step: int, ranks: list[Held], want: Held, draws: Sequence[Held] = (), exact: Held | None = None
) -> Iterator[Difference]:
    """Every tensor, assembled from the ranks' blocks; of several ranks that hold the same block the worst counts."""
    exacts, drawn = {} if exact is None else whole(exact), [whole(held) for held in draws]
    for name, wanted in whole(want).items():
        noise = max((relative(one[name].double() - exacts[name], exacts[name]) for one in drawn), default=0.0)
        error = torch.zeros_like(wanted, dtype=torch.float64)
        covered = torch.zeros_like(wanted, dtype=torch.bool)
        for offset, block in (piece for held in ranks for piece in held.get(name, [])):
            place = slices(offset, block)
            off = block.double() - wanted[place]
            error[place] = torch.where(off.abs() > error[place].abs(), off, error[place])
            error[place] = torch.where(off.isnan(), off, error[place])
            covered[place] = True
        yield Difference(kind, step, name, relative(error, wanted) if covered.all() else math.inf, noise)
