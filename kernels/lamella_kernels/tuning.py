"""Block sizes, warps and stages found by measuring: the operators' calls of a model are noted, and each is tried with
other tiles, one number doubled or halved at a time, as long as that makes it faster and changes no result.

    calls = collect(lambda: model(batch).sum().backward())
    table = tune(calls, seconds)          # {"rmsnorm_forward": [{"arch": [90], "up_to": {"W": 4096}, "ROWS": 2, ..}]}

A call is measured forward and backward together, because backward reads what forward has kept by its tiles. The table
is one for LAMELLA_TILES (`tiles.py`).
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lamella_kernels.tiles import CONDITIONS, lookups, trying

BETTER = 0.98  # of the time before: less is noise
PASSES = 3  # over all numbers: what one gains may depend on another
LARGEST = {"num_warps": 32, "num_stages": 6}
Table = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Call:
    """Of the operator lamella::NAME."""

    name: str
    arguments: tuple[Any, ...]

    @property
    def signature(self) -> str:
        words = (f"{t.dtype}{list(t.shape)}" if isinstance(t, Tensor) else repr(t) for t in self.arguments)
        return f"{self.name}({', '.join(words).replace('torch.', '')})"

    def run(self) -> list[Tensor]:
        """Its outputs, and the gradients of all it can differentiate."""
        leaves = [
            t.detach().requires_grad_(t.dtype.is_floating_point) if isinstance(t, Tensor) else t for t in self.arguments
        ]
        found = getattr(torch.ops.lamella, self.name)(*leaves)
        outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t.requires_grad]
        inputs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True)
        return [t.detach() for t in (*outputs, *gradients) if t is not None]


def collect(run: Callable[[], object]) -> list[Call]:
    """The operators' forward calls in `run()`, each once for its shapes and dtypes, with its arguments."""
    with _Note() as note:
        run()
    return list(note.calls.values())


class _Note(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lamella" and not func._opname.endswith("_backward"):
            call = Call(func._opname, args)
            if call.signature not in self.calls:
                copies = tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in args)
                self.calls[call.signature] = Call(call.name, copies)
        return func(*args, **(kwargs or {}))


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """The median on the GPU, after three to warm up."""
    taken = []
    for _ in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken[3:])


def tune(
    calls: Sequence[Call],
    measure: Callable[[Callable[[], object]], float] = seconds,
    say: Callable[[str], None] = lambda line: None,
    limit: float = float("inf"),
) -> Table:
    """The entries that made some call faster; of two calls with the same sizes the later one decides.

    Begins no further call after `limit` seconds.
    """
    table: Table = {}
    began = time.monotonic()
    for number, call in enumerate(calls):
        if time.monotonic() - began > limit:
            say(f"{len(calls) - number} calls are left, the time is over")
            break
        with lookups() as before:
            wanted = call.run()
        first = best = measure(call.run)
        chosen: dict[str, dict[str, int]] = {}
        for _ in range(PASSES):
            start = best
            for kernel, name, size in _neighbours(before, chosen):
                trial = {**chosen, kernel: {**chosen.get(kernel, {}), name: size}}
                taken = _measured(call, trial, wanted, measure)
                if taken < BETTER * best:
                    best, chosen[kernel] = taken, trial[kernel]
            if best == start:
                break
        for kernel, sizes in chosen.items():
            entry = {**before[kernel], **sizes}
            others = [e for e in table.get(kernel, []) if any(e[word] != entry[word] for word in CONDITIONS)]
            table[kernel] = [entry, *others]
        won = f"{first / best:.2f} times as fast with {chosen}" if chosen else "no other tiles are faster"
        say(f"{call.signature}: {1e6 * first:.1f} us, {won}")
    return {kernel: sorted(entries, key=_sizes) for kernel, entries in table.items()}


def _neighbours(
    before: dict[str, dict[str, Any]], chosen: dict[str, dict[str, int]]
) -> Iterator[tuple[str, str, int]]:
    """One number of one kernel doubled, and again where that was chosen; else halved, and again."""
    for kernel, entry in before.items():
        for name in sorted(entry.keys() - CONDITIONS):
            for factor in (2.0, 0.5):
                moved = False
                while True:
                    size = int({**entry, **chosen.get(kernel, {})}[name] * factor)
                    if not 1 <= size <= LARGEST.get(name, 1 << 16):
                        break
                    yield kernel, name, size
                    if chosen.get(kernel, {}).get(name) != size:
                        break
                    moved = True
                if moved:
                    break


def _measured(
    call: Call, trial: dict[str, dict[str, int]], wanted: Sequence[Tensor], measure: Callable[[Any], float]
) -> float:
    """Infinite where these tiles do not compile or give another result."""
    with trying(trial):
        try:
            found = call.run()
        except Exception:  # the compiler has many: out of registers, of shared memory, a block that is no power of 2
            return float("inf")
        if not all(_same(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)):
            return float("inf")
        return measure(call.run)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """To a few roundings: sums are cut elsewhere."""
    if ours.shape != theirs.shape:
        return False  # what is kept for backward, not a result
    a, b = ours.double(), theirs.double()
    return float((a - b).norm()) <= 8 * torch.finfo(ours.dtype).eps * float(b.norm())


def _sizes(entry: dict[str, Any]) -> list[int]:
    """Small calls first: the first entry that fits is taken."""
    return list(entry["up_to"].values())
