"""RWKV's channel mix, of version 6 (Peng et al. 2024, arXiv 2404.05892) or 7 (Peng et al. 2025, arXiv 2503.14456).

    6: sigmoid(W_r x_r) * (W_v relu(W_k x_k)^2)        7: W_v relu(W_k x_k)^2

x_i = x + mu_i (x_{t-1} - x): a token mixed with the one before it in its document. Initial values: BlinkDL/RWKV-LM,
RWKV-v5/src/model.py (x060) and RWKV-v7/train_temp/src/model.py (x070).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.channels.base import Channel, ChannelConfig
from lamella.config import Positive, change
from lamella.nn.depth import Depth
from lamella.nn.flops import Flops
from lamella.nn.initializers import by_channel, orthogonal, zeros
from lamella.nn.linear import Column, Row
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide
from lamella.nn.shift import shift


class Config(ChannelConfig):
    channel: Literal["rwkv"]
    d_ff: Positive  # published: 3.5 d_model in version 6, 4 d_model in version 7
    version: Literal[6, 7] = 7

    def build(self, d_model: int, shard: Shard, place: str) -> "ChannelMix":
        return ChannelMix(self, d_model, shard, Depth())

    def build_at(self, d_model: int, shard: Shard, place: str, depth: Depth) -> "ChannelMix":
        return ChannelMix(self, d_model, shard, depth)

    def flops(self, d_model: int, length: int) -> Flops:
        return Flops(matmul=2 * length * d_model * (2 * self.d_ff + (d_model if self.version == 6 else 0)))

    def shrink(self, tensor: int, expert: int) -> "Config":
        return change(self, d_ff=8 * tensor)


class ChannelMix(Channel):
    def __init__(self, config: Config, d_model: int, shard: Shard, depth: Depth):
        super().__init__()
        self.shard = shard
        power = depth.falling if config.version == 6 else depth.falling**4
        start = by_channel(lambda n: 1 - (n / len(n)) ** power)
        self.mix_k = shard.parameter((d_model,), start)
        self.key = Column(shard, d_model, config.d_ff, init=orthogonal(1.0), enter=False)
        self.value = Row(shard, config.d_ff, d_model, init=zeros, into="partial")
        self.mix_r = self.receptance = None
        if config.version == 6:
            self.mix_r = shard.parameter((d_model,), start)
            self.receptance = Row(shard, d_model, d_model, init=zeros, into="branch")

    def forward(self, x_BTD: Tensor, rows: Rows, state: dict[str, Any] | None = None) -> Tensor:
        x_BTD = self.shard.enter(x_BTD)
        delta_BTD = shift(x_BTD, rows, state, "channel_shift")
        k_BTF = self.key(rows.core(_mixed, x_BTD, delta_BTD, self.shard.shared(self.mix_k, "branch")))
        y_BTD = self.value(rows.core(_squared, k_BTF))
        if self.mix_r is not None and self.receptance is not None:
            x_r = rows.core(_mixed, x_BTD, delta_BTD, self.shard.shared(self.mix_r, "branch"))
            r_BTD = self.receptance(x_r.chunk(self.shard.size, dim=-1)[self.shard.rank])
            y_BTD = rows.core(_gated, self.shard.copy(r_BTD), y_BTD)
        return self.shard.leave(y_BTD)


def _mixed(x_BTD: Tensor, delta_BTD: Tensor, mu_D: Tensor) -> Tensor:
    x, delta = wide(x_BTD), wide(delta_BTD)
    return torch.addcmul(x, delta, mu_D.to(x.dtype)).to(x_BTD.dtype)


def _squared(k_BTF: Tensor) -> Tensor:
    return F.relu(k_BTF).square()


def _gated(r_BTD: Tensor, y_BTD: Tensor) -> Tensor:
    return (torch.sigmoid(wide(r_BTD)) * y_BTD).to(y_BTD.dtype)
