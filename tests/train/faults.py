"""Faults that `verify` must catch, each a change that turns another model into the trained one without any error."""

import collections
import contextlib
import dataclasses

import torch
from megatron.core.tensor_parallel import mappings

from lamella.channels import moe
from lamella.channels.moe import losses, router
from lamella.model.lm import LanguageModel
from lamella.nn import deferred
from lamella.nn.draw import Draw
from lamella.nn.linear import Row
from lamella.nn.record import Record
from lamella.parallel import expert, pipeline, zero
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

    def wrong(name, place, *seed):
        value = right(name, place, *seed)
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
        def __init__(self, feed):
            self.feed, self.step = feed, feed.step

        def target_count(self, step):
            count = sum(int((batch.targets >= 0).sum()) for _, batch in self.feed.step(step))
            return count * self.feed.mesh.layout.data

    measuring.accumulate_gradients = lambda passes, feed, *rest: right(passes, OwnCount(feed), *rest)


def aux_loss_per_micro_batch():
    """The auxiliary loss looks at a micro-batch as if it were one row."""

    def wrong(chance_BTE, load_BE, real_BT, top_k):
        one = [t.flatten(0, 1)[None] for t in (chance_BTE, real_BT)]
        return losses.balance_loss(one[0], load_BE.sum(0, keepdim=True), one[1], top_k).expand(len(load_BE))

    router.balance_loss = wrong

def leave_the_tied_ends_apart():
    """Each end of a pipeline trains its copy of the tied embedding with its own gradient."""
    right = pipeline.Pipeline.__init__

    def wrong(self, *args):
        right(self, *args)
        self.tied = None

    pipeline.Pipeline.__init__ = wrong


def divide_by_the_micro_batches():
    """Torch's schedule, by its default, makes the gradient a mean over micro-batches; the loss is one already."""
    right = pipeline.SCHEDULES["1f1b"]
    pipeline.SCHEDULES["1f1b"] = lambda *args, **options: right(*args, **(options | {"scale_grads": True}))


def keep_the_queue():
    """The waiting weight gradients that are handed out stay in the queue, and are added again."""
    deferred.WeightGradients.take = lambda self: lambda items=self.waiting: deferred._add(items)


def cut_the_carried_values():
    """A stage hands on its values, but takes no gradient for them."""
    right = pipeline._Held.forward

    def wrong(self, *args, number):
        given = right(self, *args, number=number)
        return given if torch.is_tensor(given) else (given[0], *(t.detach() for t in given[1:]))

    pipeline._Held.forward = wrong


def lose_losses_before_the_last_stage():
    """Only the stage that computes the loss adds the auxiliary ones."""
    right = LanguageModel.run

    def wrong(self, stage, x, rows, *others, **named):
        rows = rows if stage.last else dataclasses.replace(rows, loss_scale=0.0)
        return right(self, stage, x, rows, *others, **named)

    LanguageModel.run = wrong


def send_every_token_twice():
    """Each rank of a tensor group sends all tokens to the dealt experts, and the branch sums what comes back."""
    right = moe.dispatch
    moe.dispatch = lambda routing, num_experts, rank, ranks, exact: right(routing, num_experts)


def answer_in_the_order_of_the_question():
    """Outputs go back to the ranks by the permutation that sorted their tokens, not by its inverse."""

    def wrong(self, experts, x_ND, where_N, counts_E):
        sent = counts_E.view(self.size, -1)
        coming = torch.empty_like(sent)
        torch.distributed.all_to_all_single(coming, sent, group=self.group)
        sizes = sent.sum(1).tolist(), coming.sum(1).tolist()
        x_MD = mappings.all_to_all(self.group, x_ND, *sizes[::-1])
        order_M = torch.arange(coming.shape[1]).repeat(self.size).repeat_interleave(coming.flatten())
        order_M = order_M.argsort(stable=True)
        where_M = mappings.all_to_all(self.group, where_N, *sizes[::-1])
        y_MD = experts(x_MD[order_M], where_M[order_M], coming.sum(0))
        return mappings.all_to_all(self.group, y_MD[order_M], *sizes)

    expert.AllToAll.through = wrong


def take_dealt_experts_for_copies():
    """The engine is not told of dealt experts, and averages different ones over the data group."""
    zero._with_experts = lambda model, optimizer, mesh: model


def count_replicas_in_the_norm():
    """The norm that clips counts a replicated parameter once for each rank of the tensor group."""
    right = zero.placed_parameters

    def wrong(model):
        for name, parameter in right(model):
            yield name, parameter
            parameter.tensor_model_parallel = True

    zero.placed_parameters = wrong


def keep_the_last_micro_batch():
    """ZeRO 3's part of the gradient is that of the last micro-batch."""
    right = zero.Zero.backward

    def wrong(self, loss):
        self.optimizer.micro_step_id = 0
        right(self, loss)

    zero.Zero.backward = wrong


def draw_anew():
    """A second call for the same rows draws another dropout: so does the one that backward makes."""
    right, calls = Draw.uniform, collections.Counter()

    def wrong(self, place, *args):
        again = (place, *self.row_B.tolist())
        calls[again] += 1
        return right(self, place if calls[again] == 1 else f"{place}/{calls[again]}", *args)

    Draw.uniform = wrong


def record_repeated_forwards():
    """What backward computes anew is recorded again."""
    Record.pause = lambda self: contextlib.nullcontext()


def measure_with(fault, *args):
    """`measure` in a process of its own, with the fault of that name planted first."""
    globals()[fault]()
    torch.manual_seed(0)
    return measuring.measure(*args)
