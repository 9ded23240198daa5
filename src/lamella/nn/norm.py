"""Root-mean-square norms (Zhang & Sennrich 2019, arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * w, in fp32."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lamella.nn.initializers import ones
from lamella.nn.shard import Shard, wide


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
        weight = self.weight if self.where == "copied" else self.shard.shared(self.weight, self.where)
        y = wide(x)
        return F.rms_norm(y, weight.shape, weight.to(y.dtype), self.eps).to(x.dtype)
