"""What the processes of the training tests run."""

import os
import signal
import threading

from lamella.checkpoint import manifest, series
from lamella.checkpoint.background import Background
from lamella.parallel import mesh as meshes
from lamella.parallel.layout import resolve
from lamella.parallel.seat import find_seat
from lamella.train import loop, state
from lamella.train.folder import open_folder
from lamella.train.init_from import Saved


def train_and_strike(config, rank, step, signum):
    """Trains; while it computes step `step`, rank `rank` sends itself a signal."""
    right = loop.accumulate_gradients

    def strike(passes, data, mesh, now, *rest):
        nats = right(passes, data, mesh, now, *rest)
        if now == step and mesh.seat.rank == rank:
            os.kill(os.getpid(), signum)
        return nats

    loop.accumulate_gradients = strike
    loop.enter(config)


def held_after_load(config, opened=Saved):
    """Loads the newest checkpoint; returns what this process holds of it: (name, whole shape, offset, tensor)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seat = find_seat()
    open_folder(config)
    mesh = meshes.join(seat, resolve(config, seat.world), timeout=60)
    run = loop.Run(config, mesh, opened)
    held = [
        (name, tuple(pieces.shape), tuple(offset), view.clone())
        for name, pieces in state.tensors(run.zero).items()
        for offset, view in pieces.held.items()
    ]
    found = list(run.zero.parameters())
    parameters = {name: tensor for name, _, tensor in found}
    places = {name: place.boxes for name, place, _ in found}
    step = run.step
    meshes.leave()
    return held, parameters, places, step


def train_and_die(config, rank, step, seconds):
    """Trains; rank `rank` is killed so many seconds after it has begun to save step `step`."""
    right = Background.save

    def save(self, path, *rest):
        if int(os.environ["RANK"]) == rank and series.step_of(path) == step:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        right(self, path, *rest)

    Background.save = save
    loop.enter(config)


def train_on_a_full_disk(config, steps):
    """Trains; the disk has no room for the checkpoints of these steps."""
    right = manifest.write

    def write(folder, entries):
        if any(folder.name.startswith(f"step-{step:08d}") for step in steps):
            raise OSError(28, "No space left on device")
        right(folder, entries)

    manifest.write = write
    loop.enter(config)


def say_into(file, function, *args):
    """Runs it; what the first process writes to its standard error is in the file."""
    if os.environ["RANK"] == "0":
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as said:
            os.dup2(said.fileno(), 2)
    return function(*args)
