"""The GPU kernels beside torch's and others' on the same tensors, in one run: `python -m tools.bench_kernels [--json]`.

bf16, forward, and forward with backward; the sides of a case in turn, the L2 cache written over before each call,
medians of `--rounds`. `times` is the others' time over ours. Memory-bound operators are held to the bandwidth of a copy
measured here, matmuls to the rate of a large one. Peers are those that are installed: mamba_ssm, flash-linear-attention
(fla), Liger. Lengths up to 131,072 tokens, as many rows as make 16,384 at least.

Without CUDA it ends with one line, but for `--interpreted`: tiny sizes in Triton's interpreter, which says nothing of
speed and shows that every case runs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms
from tools.kernel_cases import CASES, Case

LENGTHS = (2048, 8192, 32768, 131072)
TOKENS = 16384  # a call at least
FLUSH = 1 << 28  # bytes, more than any L2
Line = dict[str, Any]


def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a copy (read and write counted) and TFLOP/s of a matmul of 8,192 in bf16."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_of(lambda: target.copy_(source), 20)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    matmul = time_of(lambda: a @ b, 20)
    return {"copy_gb_s": 2 * source.numel() / copy / 1e9, "matmul_tflop_s": 2 * 8192**3 / matmul / 1e12}


def time_of(call: Callable[[], object], rounds: int) -> float:
    """Seconds, median."""
    call()
    return statistics.median(once(call) for _ in range(rounds))


def once(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.empty(FLUSH, dtype=torch.uint8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def sides_of(case: Case, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    def form(name: forms.Form) -> Callable[[], Any]:
        def call() -> Any:
            with forms.use(name):
                return case.ours(**inputs)

        return call

    found: dict[str, Callable[[], Any]] = {"ours": form("gpu"), "eager": form("eager")}
    for name, make in case.peers.items():
        try:
            peer = make()
        except ImportError:
            continue
        found[name] = lambda peer=peer: peer(**inputs)
    return found


def with_backward(call: Callable[[], Any], inputs: dict[str, Tensor]) -> Callable[[], Any]:
    wanted = [t for t in inputs.values() if t.requires_grad]

    def both() -> Any:
        y = call()
        y = y[0] if isinstance(y, tuple) else y
        return torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

    return both


def bench(
    case: Case, length: int, rows: int, device: torch.device, rounds: int, top: dict[str, float]
) -> Iterator[Line]:
    inputs = case.inputs(rows, length, device)
    sides = sides_of(case, inputs)
    for kind in ("forward", "forward + backward"):
        calls = {n: call if kind == "forward" else with_backward(call, inputs) for n, call in sides.items()}
        calls = {name: call for name, call in calls.items() if runs(name, call)}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(once(call))
        seconds = {name: statistics.median(found) for name, found in times.items()}
        line: Line = {"op": case.name, "length": length, "rows": rows, "what": kind}
        line |= {f"{name}_ms": 1000 * s for name, s in seconds.items()}
        line |= {f"{name}_times": s / seconds["ours"] for name, s in seconds.items() if name != "ours"}
        moved, work = case.bytes(rows * length), case.flops(rows * length)
        parts = (1, 1) if kind == "forward" else case.backward
        if top and moved:
            line["of_copy"] = moved * parts[0] / seconds["ours"] / 1e9 / top["copy_gb_s"]
        if top and work:
            line["of_matmul"] = work * parts[1] / seconds["ours"] / 1e12 / top["matmul_tflop_s"]
        if torch.cuda.is_available():
            line |= {f"{name}_mib": peak(call) for name, call in calls.items()}
        yield line


def runs(name: str, call: Callable[[], Any]) -> bool:
    """A peer that refuses the sizes, or has no memory for them, is left out and named; ours never is."""
    if name == "ours":
        return True
    try:
        call()
        return True
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        print(f"  {name} does not run: {' '.join(str(error).split())[:100]}", file=sys.stderr)
        return False


def peak(call: Callable[[], Any]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def table(line: Line) -> str:
    words = [f"{line['op']:<22}{line['rows']:>3} x {line['length']:<8,}{line['what']:<20}{line['ours_ms']:9.3f} ms"]
    words += [f"{key.removesuffix('_times')} {line[key]:.2f}x" for key in line if key.endswith("_times")]
    words += [
        f"{name} {line[key]:.0%}" for key, name in (("of_copy", "of copy"), ("of_matmul", "of matmul")) if key in line
    ]
    return "   ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--interpreted", action="store_true", help="tiny sizes in Triton's interpreter, for no figures")
    given = parser.parse_args()
    if not torch.cuda.is_available() and not given.interpreted:
        sys.exit("bench_kernels: no CUDA here; --interpreted shows that the cases run")
    device = torch.device("cpu" if given.interpreted else "cuda")
    top = {} if given.interpreted else ceilings(device)
    show: Callable[[Line], str] = json.dumps if given.json else table
    if top:
        print(json.dumps({"device": torch.cuda.get_device_name()} | top))
    for case in CASES:
        if given.only and case.name not in given.only:
            continue
        for length in (100,) if given.interpreted else given.lengths:
            rows = 1 if given.interpreted else max(1, TOKENS // length)
            for line in bench(case, length, rows, device, 1 if given.interpreted else given.rounds, top):
                print(show(line), flush=True)


if __name__ == "__main__":
    main()
