"""A run's kernels before its first step: compiled while nobody waits, and the tiles they have written down."""

import json
import time
from pathlib import Path

import torch

from lamella.config import RunConfig
from lamella.parallel import cpu_host
from lamella.parallel.layout import Layout
from lamella.parallel.seat import Seat
from lamella.train.rehearse import warm_up
from lamella.train.say import say
from lamella_kernels import forms, tiles

FILE = "kernels.json"  # in the run's folder


def prepare_kernels(run: RunConfig, layout: Layout, seat: Seat) -> None:
    """Nothing on a CPU. Compiles before any collective can wait for it, and records the tiles in the run's folder."""
    device = cpu_host.device(seat.local_rank)
    if device.type != "cuda" or not forms.HAS_TRITON:
        return
    torch.cuda.set_device(device)
    begin = time.monotonic()
    try:
        warm_up(run, layout, device)
        done = f"kernels are compiled ({time.monotonic() - begin:.0f} s)"
    except torch.OutOfMemoryError:  # a step itself may fit: its layers come one after the other
        done = "kernels are compiled as they come: the rehearsal did not fit the GPU's memory"
    if seat.rank == 0:
        say(done)
        record_tiles(run.folder)


def record_tiles(folder: Path) -> None:
    """Writes the table, and says so where the run's attempt before had another: sums may be rounded differently."""
    path = folder / FILE
    now = {"architecture": tiles.architecture(), "tiles": tiles.table()}
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = now
    if before != now:
        say(f"{path}: the kernels' tiles have changed since this run began; losses may differ by rounding")
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(now, indent=1) + "\n")
    aside.replace(path)
