"""A projection of low rank inside a branch: y = b + B f(A x), RWKV's way to what depends on the token."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lamella.nn.initializers import Initializer, zeros
from lamella.nn.shard import Shard


class LowRank(nn.Module):
    """`up` [out, R] and `bias` [out] are split over the ranks, `down` [R, in] is replicated; x is whole.

    Starts as the bias alone (`down` at 0). No weight decay, as published.
    """

    def __init__(
        self,
        shard: Shard,
        d_in: int,
        rank: int,
        d_out: int,
        *,
        activation: Callable[[Tensor], Tensor] | None = None,
        init: Initializer,
        bias: Initializer | None = None,
    ):
        super().__init__()
        self.shard, self.activation = shard, activation
        self.down = shard.parameter((rank, d_in), zeros)
        self.up = shard.parameter((d_out, rank), init, split=0)
        self.bias = None if bias is None else shard.parameter((d_out,), bias, split=0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTR = F.linear(x_BTD, self.shard.shared(self.down, "branch").to(x_BTD.dtype))
        return self.shard.linear(h_BTR if self.activation is None else self.activation(h_BTR), self.up, self.bias)
