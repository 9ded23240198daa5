"""Faults that `verify` must catch, each a change that turns another model into the trained one without any error."""

import torch

from lamella.channels.moe import losses, router
from lamella.nn.linear import Row
from lamella.parallel.tensor import TensorShard
from lamella.train import measure as measuring
from lamella.train import probe


def drop_x_proj_sum():
    """Mamba's x_proj keeps each rank's partial sum of dt, B and C."""
    whole = Row.forward
    Row.forward = lambda self, x: x @ self.weight.t() if self.into == "branch" else whole(self, x)


def draw_dt_bias_from_local_index():
    """Each rank draws its channels of the dt bias as if they were the first ones."""
    right = probe._perturbed

    def wrong(name, place, seed):
        value = right(name, place, seed)
        if not name.endswith("dt_proj.bias"):
            return value
        width = place.boxes[0].size[0]
        return value[:width].repeat(len(value) // width)

    probe._perturbed = wrong


def skip_norm_gradient_sum():
    """The norms on a sequence-parallel stream keep the gradient of the rank's own time slice."""
    right = TensorShard.shared
    TensorShard.shared = lambda self, weight, where: weight if where == "stream" else right(self, weight, where)


def average_losses_per_rank():
    """Each rank divides by its own count of targets, and the means are averaged."""
    right = measuring.accumulate_gradients

    class OwnCount:
        def __init__(self, data, mesh):
            self.data, self.mesh, self.batch = data, mesh, data.batch

        def target_count(self, step):
            mine = self.mesh.layout.micro_batches(self.mesh.data_rank)
            count = sum(int((self.data.batch(step, rows).targets >= 0).sum()) for rows in mine)
            return count * self.mesh.layout.data

    measuring.accumulate_gradients = lambda passes, data, mesh, *rest: right(passes, OwnCount(data, mesh), mesh, *rest)


def aux_loss_per_micro_batch():
    """The auxiliary loss looks at a micro-batch as if it were one row."""

    def wrong(chance_BTE, load_BE, real_BT, top_k):
        one = [t.flatten(0, 1)[None] for t in (chance_BTE, real_BT)]
        return losses.balance_loss(one[0], load_BE.sum(0, keepdim=True), one[1], top_k).expand(len(load_BE))

    router.balance_loss = wrong


def measure_with(fault, *args):
    """`measure` in a process of its own, with the fault of that name planted first."""
    globals()[fault]()
    torch.manual_seed(0)
    return measuring.measure(*args)
