"""What the processes of the launcher's and the seam's tests run."""

import os
import signal
import sys
import time

import torch

from lamella.config import load_run
from lamella.errors import UserError
from lamella.parallel import mesh as meshes
from lamella.parallel.layout import resolve
from lamella.parallel.seat import find_seat
from lamella.parallel.tensor import TensorShard


def seat_and_word(word):
    return find_seat(), word


def one_makes_a_mistake():
    if os.environ["RANK"] == "1":
        raise UserError("this is how to mend it")


def one_exits(code):
    sys.exit(code if os.environ["RANK"] == "1" else 0)


def one_dies_the_other_waits():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def gradients_of_views():
    """`copy` and `sum` on tensors and gradients that are no contiguous memory, and that others use as well."""
    seat = find_seat()
    run = load_run("configs/run/quickstart.yaml", ["layout.tensor=2"])
    mesh = meshes.join(seat, resolve(run, seat.world), timeout=60)
    shard = TensorShard(mesh.tensor, False, torch.float32, 0.02, 1)
    x = torch.arange(6.0).view(2, 3).t().requires_grad_()
    y = shard.copy(x)
    weight = torch.arange(6.0).view(2, 3).t() * (1 + seat.rank)  # a gradient that is a transposed view
    (y * weight).sum().backward()
    total = shard.sum(x.detach().t()[:, ::2])
    meshes.leave()
    return x.grad, total
