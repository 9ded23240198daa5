"""The seam between mathematics and layout: every mixer and channel mixer builds its parameters through a `Shard`.

A `Shard` stands for one rank of a tensor group. `Whole`, below, is the group of one; `parallel/tensor.py` has the one
that communicates. Parts never import torch.distributed and never learn which one they were given.

The **stream** is the residual between branches; under sequence parallelism a rank holds a slice of its time. Inside a
**branch**, between `enter` and `leave`, every rank sees whole rows and its own share of the channels. So in backward

- after `leave` and before `enter` a gradient is whole (of the rank's slice of the stream),
- inside a branch it is *partial*: the ranks' gradients add up to the whole one. What is replicated inside a branch is
  made whole where it is used: a weight by `shared`, an activation by `copy`, a loss by being divided by `size`.

Each parameter carries its `Place`: the shape of the whole tensor and the boxes of it that this rank holds.

Experts may be dealt to the ranks of another group, which its `Exchange` stands for.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.errors import UserError
from lamella.nn.deferred import WeightGradients
from lamella.nn.initializers import Initializer, normal
from lamella_kernels.linear_cross_entropy import linear_log_sum_exp


@dataclasses.dataclass(frozen=True)
class Box:
    """The block `size` at `local` of this rank's tensor is the block of that size at `whole` of the global tensor."""

    local: tuple[int, ...]
    size: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def local_slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.local, self.size, strict=True))

    @property
    def whole_slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.whole, self.size, strict=True))


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter's place in the whole. Checkpoints, initialisation and verification use nothing else."""

    shape: tuple[int, ...]  # of the global tensor
    boxes: tuple[Box, ...]
    owner: bool  # this rank writes it; of a replica set one rank does
    replicated: bool  # every rank of the tensor group holds all of it
    init: Initializer
    decay: bool  # weight decay applies
    active: float = 1.0  # share of it that one token uses
    expert: bool = False  # dealt over the expert group
    copy: bool = False  # a tied weight's second one, at the other end of a pipeline

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's tensor."""
        return tuple(max(b.local[d] + b.size[d] for b in self.boxes) for d in range(len(self.shape)))


class Parameter(nn.Parameter):
    """An nn.Parameter with a `place`."""

    place: Place
    _hp_mapping: Any  # where DeepSpeed keeps its fp32 master; read by parallel/zero.py alone
    tensor_model_parallel: bool  # DeepSpeed's and megatron's word for "not replicated"
    ds_pipe_replicated: bool  # DeepSpeed's word for a tied copy


def placed_parameters(module: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """The module's parameters by their global names, each with its place."""
    return module.named_parameters()  # type: ignore[return-value]


class Exchange:
    """How tokens reach their experts, and their outputs come back: here all experts are at home."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    def through(
        self, experts: Callable[[Tensor, Tensor, Tensor], Tensor], x_ND: Tensor, where_N: Tensor, counts_E: Tensor
    ) -> Tensor:
        """`experts(x_ND, where_N, counts_E)`: rows sorted by expert, so many for each; returns the same rows.

        `where_N` names the rows' tokens, int64, as `counts_E`.
        """
        return experts(x_ND, where_N, counts_E)


class Shard(ABC):
    """One rank of a tensor group. Activations are [B, T, ...]; `size` ranks, this one is `rank`.

    `deferred`: where linears leave their weights' gradients to be computed later, if anywhere. `pieces`: the head's
    logits are made some of the vocabulary at a time, and again in backward.
    """

    deferred: WeightGradients | None = None
    pieces = False

    def __init__(
        self,
        rank: int,
        size: int,
        dtype: torch.dtype,
        init_std: float,
        num_layers: int,
        exchange: Exchange | None = None,
    ):
        self.rank, self.size, self.dtype = rank, size, dtype
        self.exchange = exchange or Exchange()
        self.normal = normal(init_std)
        self.residual_normal = normal(init_std / (2 * num_layers) ** 0.5)  # adds to the stream (Radford et al. 2019)

    def parameter(
        self,
        shape: Sequence[int],
        init: Initializer,
        *,
        split: int | None = None,
        segments: Sequence[int] | None = None,
        decay: bool = False,
        active: float = 1.0,
        over: Literal["tensor", "expert"] = "tensor",
    ) -> Parameter:
        """This rank's part of a parameter of `shape`: all of it, or its share of dim `split` over a group.

        A fused dim is cut segment by segment (`segments` sum to its length), so that every rank holds its share of
        each. Raises UserError where a segment does not divide by the group's size.
        """
        shape = tuple(shape)
        rank, ranks = (self.rank, self.size) if over == "tensor" else (self.exchange.rank, self.exchange.size)
        if split is None:
            zeros = (0,) * len(shape)
            boxes, local = [Box(zeros, shape, zeros)], shape
        else:
            segments = tuple(segments or (shape[split],))
            assert sum(segments) == shape[split], (shape, segments)
            boxes, at, base = [], 0, 0
            for n in segments:
                if n % ranks:
                    what = "a width of" if over == "tensor" else "num_experts ="
                    raise UserError(f"{what} {n} cannot be split over {over}={ranks}; choose a divisor of {n}")
                share = n // ranks
                local, whole = [0] * len(shape), [0] * len(shape)
                local[split], whole[split] = at, base + rank * share
                size = (*shape[:split], share, *shape[split + 1 :])
                boxes.append(Box(tuple(local), size, tuple(whole)))
                at, base = at + share, base + n
            local = (*shape[:split], at, *shape[split + 1 :])
        parameter = Parameter(torch.empty(local))
        replicated = split is None
        parameter.place = Place(
            shape, tuple(boxes), not replicated or self.rank == 0, replicated, init, decay, active, over == "expert"
        )
        return parameter

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """Stream -> branch: the whole rows [B, T, D]; backward sums the ranks' partial gradients."""

    @abstractmethod
    def leave(self, y_BTD: Tensor) -> Tensor:
        """Branch -> stream: the sum of the ranks' partial outputs."""

    def linear(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        """`F.linear` in x's dtype."""
        if self.deferred is not None:
            return self.deferred.linear(x, weight, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def enter_linear(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        """`linear(enter(x), weight, bias)`."""
        return self.linear(self.enter(x), weight, bias)

    @abstractmethod
    def copy(self, x: Tensor) -> Tensor:
        """Identity; backward sums the gradients, so that they are whole before it. For replicated activations."""

    @abstractmethod
    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks; backward is the identity. For sums over channels inside a branch."""

    @abstractmethod
    def shared(self, weight: Tensor, where: Literal["stream", "branch"]) -> Tensor:
        """A replicated weight used on the stream or inside a branch; backward makes its gradient whole."""

    @abstractmethod
    def stream(self, x_BT: Tensor) -> Tensor:
        """Of a tensor with one value a token [B, T, ...], the tokens whose stream this rank holds."""

    def nats(self, x: Tensor, weight_VD: nn.Parameter, targets_BT: Tensor) -> Tensor:
        """-log softmax(enter(x) W^T) at the targets, [B, T] in fp32 (0 where they are below 0), W's rows split."""
        if self.pieces:
            start = self.rank * len(weight_VD)
            lse_BT, picked_BT = linear_log_sum_exp(self.enter(x), weight_VD, targets_BT - start)
            nats_BT = self.log_sum_exp(lse_BT) - self.sum(picked_BT)
        else:
            nats_BT = self.cross_entropy(self.enter_linear(x, weight_VD, None), targets_BT.clamp(min=0))
        return torch.where(targets_BT >= 0, nats_BT, 0)

    @abstractmethod
    def log_sum_exp(self, lse_BT: Tensor) -> Tensor:
        """The logarithm of the sum of the ranks' exponentials."""

    @abstractmethod
    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """-log softmax at the targets, [B, T] in fp32, from this rank's columns of the logits (targets >= 0)."""


class Whole(Shard):
    """A tensor group of one: nothing is split over it, nothing communicated."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        init_std: float = 0.02,
        num_layers: int = 1,
        exchange: Exchange | None = None,
    ):
        super().__init__(0, 1, dtype, init_std, num_layers, exchange)

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, y_BTD: Tensor) -> Tensor:
        return y_BTD

    def copy(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def shared(self, weight: Tensor, where: Literal["stream", "branch"]) -> Tensor:
        return weight

    def stream(self, x_BT: Tensor) -> Tensor:
        return x_BT

    def log_sum_exp(self, lse_BT: Tensor) -> Tensor:
        return lse_BT

    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        logits = wide(logits_BTV)
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.long().flatten(), reduction="none").view_as(targets_BT)


def wide(x: Tensor) -> Tensor:
    """x in at least fp32: what norms, softmax, routers, scans and losses compute in."""
    return x if x.dtype == torch.float64 else x.float()
