"""Saving and loading a training state beside what others do with the same state, on the same processes, in one run.

    OMP_NUM_THREADS=1 python -m tools.bench_checkpoints [--folder DIR] [--rounds 5] [--width 768]

The hybrid of tools/bench_memory.py at a width (384: 37 M parameters, 768: 85 M) under data=2, zero=1: masters and both
moments. Each round saves and loads with every writer in turn. A save counts when its files are synced, whoever syncs
them; a load reads from the page cache, as after a restart on the same machine. `ours` compares every digest when it
loads; no other does. `stall` is how long training stands still for a save in the background, in memory that the saves
before have touched. Printed: medians in seconds, and how many times as fast as ours.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from lamella.checkpoint import store
from lamella.checkpoint.background import Background
from lamella.config import load_run
from lamella.parallel import mesh as meshes
from lamella.parallel.apply import build_model
from lamella.parallel.layout import resolve
from lamella.parallel.local import run_local
from lamella.parallel.seat import find_seat
from lamella.parallel.zero import Zero
from lamella.train import state
from lamella.train.optimizer import make_optimizer
from tools.bench_memory import MODEL

RUN = Path(__file__).parent.parent / "configs" / "run" / "quickstart.yaml"


def measure(folder: Path, rounds: int, width: int) -> dict[str, list[float]]:
    """Seconds by what was done, as the slowest process took them."""
    seat = find_seat()
    run = load_run(str(RUN), ["layout.data=2", "layout.zero=1"])
    model = type(run.model).model_validate(MODEL | {"d_model": width}, strict=False)
    run = run.model_copy(update={"model": model})
    mesh = meshes.join(seat, resolve(run, seat.world))
    model = build_model(run.model, mesh, "fp32", 0)
    zero = Zero(model, make_optimizer(model, run.train.optimizer), 1.0, mesh)
    zero.prepare_state(1)
    tensors = state.tensors(zero)
    group: Any = dist.new_group(backend="gloo")
    mine = {f"{name}/{offset}": view for name, held in tensors.items() for offset, view in held.held.items()}
    background = Background()
    times: dict[str, list[float]] = {"bytes": [float(sum(view.nbytes for view in mine.values()))]}

    def plain(to: Path) -> None:
        to.mkdir(exist_ok=True)
        with (to / f"{seat.rank}.pt").open("wb") as file:
            torch.save(mine, file)

    def load_plain(to: Path) -> None:
        found = torch.load(to / f"{seat.rank}.pt", weights_only=True)
        for name, view in mine.items():
            view.copy_(found[name])

    def shared() -> dict[str, Any]:
        return {f"{seat.rank}/{name}": view for name, view in mine.items()}

    savers: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
        "ours": (lambda to: store.save(to, tensors, {}, group), lambda to: store.load(to, tensors, group)),
        "torch.save": (plain, load_plain),
        "DCP": (
            lambda to: dcp.save(shared(), checkpoint_id=to, process_group=group),
            lambda to: dcp.load(shared(), checkpoint_id=to, process_group=group),
        ),
        "DeepSpeed": (
            lambda to: zero.engine.save_checkpoint(str(to), tag="x"),
            lambda to: zero.engine.load_checkpoint(str(to), tag="x"),
        ),
    }
    for number in range(rounds + 1):  # the first warms up
        for name, (save, load) in savers.items():
            to = folder / f"{name}-{number}"
            seconds = timed(lambda save=save, to=to: (save(to), sync(to)))
            times.setdefault(f"save {name}", []).append(seconds)
            times.setdefault(f"load {name}", []).append(timed(lambda load=load, to=to: load(to)))
            if seat.rank == 0:
                shutil.rmtree(to)
        to = folder / f"background-{number}"
        times.setdefault("stall", []).append(timed(lambda to=to: background.save(to, tensors, {}, {}, lambda: None)))
        failure = background.finish()
        assert failure is None, failure
        dist.barrier()
        if seat.rank == 0:
            shutil.rmtree(to)
    meshes.leave()
    return times


def timed(function: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    function()
    seconds = torch.tensor([time.perf_counter() - start])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's folder for such files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        outcomes = run_local(2, measure, Path(folder), args.rounds, args.width, timeout=3600)
    first = outcomes[0].value
    if first is None:
        raise SystemExit("a process failed; its traceback is above")
    total = sum(o.value["bytes"][0] for o in outcomes if o.value)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in first.items() if name != "bytes"}
    print(f"{total / 2**20:.0f} MiB, median of {args.rounds} rounds")
    for name, seconds in medians.items():
        verb, _, who = name.partition(" ")
        against = medians["save ours"] if name == "stall" else medians[f"{verb} ours"]
        ratio = f"{seconds / against:.2f} of ours in the foreground" if not who else f"{against / seconds:.2f} x"
        print(f"{name:<18}{seconds:8.2f} s   {ratio}   {total / 2**20 / seconds:8.0f} MiB/s")


if __name__ == "__main__":
    main()
