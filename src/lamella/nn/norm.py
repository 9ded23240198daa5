"""Norms, in fp32.

    RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467)    x / sqrt(mean(x^2) + eps) * w
    LayerNorm (Ba et al. 2016, arXiv 1607.06450)         (x - mean(x)) / sqrt(var(x) + eps) * w + b
    HeadNorm                                             LayerNorm of each head by itself, w and b by channel
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lamella.nn.initializers import Initializer, ones, zeros
from lamella.nn.shard import Shard, wide
from lamella_kernels.rmsnorm import rmsnorm


class RMSNorm(nn.Module):
    """Over the last dim, which every rank holds whole; the weight is replicated.

    `where` says what it is used on: "stream", "branch" (channels split over the ranks: heads), or "copied" (replicated
    inside a branch with `shard.copy` behind it, so that its gradient is whole already).
    """

    def __init__(self, shard: Shard, width: int, eps: float, where: Literal["stream", "branch", "copied"] = "stream"):
        super().__init__()
        self.shard, self.eps = shard, eps
        self.where: Literal["stream", "branch", "copied"] = where
        self.weight = shard.parameter((width,), ones)

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.shared_weight(), eps=self.eps)  # type: ignore[return-value]

    def behind(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + y), and x + y."""
        return rmsnorm(y, self.shared_weight(), eps=self.eps, residual=x)  # type: ignore[return-value]

    def shared_weight(self) -> Tensor:
        return self.weight if self.where == "copied" else self.shard.shared(self.weight, self.where)


class PlainRMSNorm(nn.Module):
    """RMSNorm without a weight (w = 1), over the last dim, which every rank holds whole."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, eps=self.eps)  # type: ignore[return-value]


class LayerNorm(nn.Module):
    """Over the last dim of the stream, which every rank holds whole; weight and bias are replicated."""

    def __init__(self, shard: Shard, width: int, eps: float):
        super().__init__()
        self.shard, self.eps = shard, eps
        self.weight, self.bias = shard.parameter((width,), ones), shard.parameter((width,), zeros)

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        weight, bias = (self.shard.shared(p, "stream").to(y.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(y, weight.shape, weight, bias, self.eps).to(x.dtype)

    def behind(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + y), and x + y."""
        x = x + y
        return self(x), x


class HeadNorm(nn.Module):
    """Over each head of [B, T, H, V], heads split over the ranks (a GroupNorm, Wu & He 2018): returns [B, T, H * V]."""

    def __init__(self, shard: Shard, channels: int, eps: float, init: Initializer = ones):
        super().__init__()
        self.eps = eps
        self.weight = shard.parameter((channels,), init, split=0)
        self.bias = shard.parameter((channels,), zeros, split=0)

    def forward(self, x_BTHV: Tensor) -> Tensor:
        y = wide(x_BTHV)
        y = F.layer_norm(y, y.shape[-1:], eps=self.eps).flatten(2)
        return (y * self.weight.to(y.dtype) + self.bias.to(y.dtype)).to(x_BTHV.dtype)


def stream_norm(kind: Literal["rms", "layer"], shard: Shard, width: int, eps: float) -> RMSNorm | LayerNorm:
    """A norm of the stream, by its name in a model file."""
    return RMSNorm(shard, width, eps) if kind == "rms" else LayerNorm(shard, width, eps)
