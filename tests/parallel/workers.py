"""What the processes of the launcher's and the seam's tests run."""

import dataclasses
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from lamella.config import load_run
from lamella.errors import UserError
from lamella.parallel import mesh as meshes
from lamella.parallel.expert import AllToAll
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


GROUPS = ("tensor", "data", "pipeline", "model", "expert", "expert_data")


def neighbours(run):
    """The ranks of each group that this process is in, in the group's order."""
    seat = find_seat()
    mesh = meshes.join(seat, resolve(run, seat.world), timeout=60)
    found = {name: dist.get_process_group_ranks(getattr(mesh, name)) for name in GROUPS}
    meshes.leave()
    return found


def exchanged(counts, seed):
    """Dealt experts on this rank's rows, as many for each expert as `counts[rank]` says: output and gradients.

    Rows and weights of all ranks are drawn from `seed`, so that one process can do the same.
    """
    seat = find_seat()
    run = load_run("configs/run/quickstart.yaml", [f"train.global_batch_size={seat.world}", "layout.micro_batch=1"])
    mesh = meshes.join(seat, dataclasses.replace(resolve(run, seat.world), expert=seat.world), timeout=60)
    x, grad = (rows(counts, seed + i)[seat.rank].requires_grad_(i == 0) for i in range(2))
    weight = expert_weights(len(counts[0]), seed).chunk(seat.world)[seat.rank].clone().requires_grad_()
    exchange = AllToAll(mesh.expert)

    y = exchange.through(tanh_experts(weight), x, names(counts)[seat.rank], torch.tensor(counts[seat.rank]))
    y.backward(grad)
    meshes.leave()
    return y.detach(), x.grad, weight.grad


def tanh_experts(weight):
    """Experts whose outputs depend on the tokens' names, too."""

    def experts(x_ND, where_N, counts_E):
        pieces = [torch.tanh(t @ w) for t, w in zip(x_ND.split(counts_E.tolist()), weight, strict=True)]
        return torch.cat(pieces) * where_N[:, None]

    return experts


def names(counts):
    """For each rank its rows' names."""
    return [100 * rank + torch.arange(sum(mine)) for rank, mine in enumerate(counts)]


def rows(counts, seed, width=3):
    """For each rank its rows, sorted by expert."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(mine), width, generator=g, dtype=torch.float64) for mine in counts]


def expert_weights(number, seed, width=3):
    g = torch.Generator().manual_seed(seed + 100)
    return torch.randn(number, width, width, generator=g, dtype=torch.float64)
