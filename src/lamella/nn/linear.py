"""The linear parts of a branch, each written once over the seam: column, row, embedding."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.nn.initializers import Initializer, zeros
from lamella.nn.shard import Shard


class Column(nn.Module):
    """y = x W^T + b with W's rows split over the ranks: x is whole, y is this rank's share of every segment.

    `segments` are the widths of a fused projection; `forward` then returns one tensor for each. With `enter` (the
    default) x comes from the stream and enters the branch here; else x is whole and replicated already.
    """

    def __init__(
        self,
        shard: Shard,
        d_in: int,
        segments: Sequence[int] | int,
        *,
        bias: Initializer | None = None,
        init: Initializer | None = None,
        enter: bool = True,
    ):
        super().__init__()
        self.segments = (segments,) if isinstance(segments, int) else tuple(segments)
        self.fused = not isinstance(segments, int)
        d_out = sum(self.segments)
        self.shard, self.enter = shard, enter
        self.weight = shard.parameter(
            (d_out, d_in), init or shard.normal, split=0, segments=self.segments, decay=True
        )
        self.bias = None if bias is None else shard.parameter((d_out,), bias, split=0, segments=self.segments)

    def forward(self, x: Tensor):
        y = self.joined(x)
        return y.split([n // self.shard.size for n in self.segments], dim=-1) if self.fused else y

    def joined(self, x: Tensor) -> Tensor:
        """The segments in one tensor."""
        return (self.shard.enter_linear if self.enter else self.shard.linear)(x, self.weight, self.bias)


class Row(nn.Module):
    """y = x W^T + b with W's columns split over the ranks: x is this rank's share, y the sum over the ranks.

    `into="stream"` leaves the branch; `"branch"` sums inside it (replicated there); `"partial"` leaves the sum to the
    caller.
    """

    def __init__(
        self,
        shard: Shard,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        init: Initializer | None = None,
        into: Literal["stream", "branch", "partial"] = "stream",
    ):
        super().__init__()
        assert not bias or into == "stream"
        self.shard, self.into = shard, into
        init = init or (shard.normal if into == "branch" else shard.residual_normal)
        self.weight = shard.parameter((d_out, d_in), init, split=1, decay=True)
        self.bias = shard.parameter((d_out,), zeros) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.shard.linear(x, self.weight)
        if self.into == "partial":
            return y
        if self.into == "branch":
            return self.shard.sum(y)
        y = self.shard.leave(y)
        return y if self.bias is None else y + self.shard.shared(self.bias, "stream").to(y.dtype)


class Embedding(nn.Module):
    """Rows of W [V, D] by token, V split over the ranks; the result is on the stream, in the shard's dtype.

    `norm`, if any, is applied there.
    """

    def __init__(
        self,
        shard: Shard,
        vocab_size: int,
        d_model: int,
        norm: nn.Module | None = None,
        init: Initializer | None = None,
    ):
        super().__init__()
        self.shard, self.norm = shard, norm
        self.weight = shard.parameter((vocab_size, d_model), init or shard.normal, split=0, decay=True)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = tokens_BT.long() - self.shard.rank * rows
        here = (local >= 0) & (local < rows)
        x_BTD = F.embedding(torch.where(here, local, 0), self.weight).to(self.shard.dtype)
        x_BTD = self.shard.leave(x_BTD * here.unsqueeze(-1))
        return x_BTD if self.norm is None else self.norm(x_BTD)
