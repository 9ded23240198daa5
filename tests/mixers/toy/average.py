"""A gated moving average whose rate depends on the token: the smallest mixer that owes the whole contract.

    h_t = a_t h_{t-1} + (1 - a_t) x_t        y_t = W_o (h_t * silu(g_t))        a_t = sigmoid(W_a u_t + b)

x, a and g are projections of u. B batch, T time, D model width, I inner channels (split over the tensor group).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.config import Positive
from lamella.mixers.base import Mixer, MixerConfig, State
from lamella.nn.flops import Flops
from lamella.nn.initializers import uniform
from lamella.nn.linear import Column, Row
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide


class Config(MixerConfig):
    mixer: Literal["average"]
    expand: Positive = 1

    def build(self, d_model: int, norm_eps: float, shard: Shard) -> "Average":
        return Average(self.expand * d_model, d_model, shard)

    def flops(self, d_model: int, length: int) -> Flops:
        inner = self.expand * d_model
        return Flops(matmul=8 * length * d_model * inner, scan=4 * length * inner)

    def shrink(self, tensor: int) -> "Config":
        return self


class Average(Mixer):
    def __init__(self, inner: int, d_model: int, shard: Shard):
        super().__init__()
        self.projections = Column(shard, d_model, (inner,) * 3, bias=uniform(1.0))
        self.out = Row(shard, inner, d_model)

    def forward(self, x_BTD: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        return self.out(rows.core(_average, *self.projections(x_BTD), rows, {} if state is None else state))


def _average(x_BTI: Tensor, a_BTI: Tensor, g_BTI: Tensor, rows: Rows, state: State) -> Tensor:
    rate_BTI = torch.sigmoid(wide(a_BTI))
    kept_BTI, new_BTI = rate_BTI * ~rows.reset_BT.unsqueeze(-1), (1 - rate_BTI) * wide(x_BTI)
    h_BI, seen = state.get("h", torch.zeros_like(new_BTI[:, 0])), []
    for kept, new in zip(kept_BTI.unbind(1), new_BTI.unbind(1), strict=True):
        seen.append(h_BI := kept * h_BI + new)
    state["h"] = h_BI
    return (torch.stack(seen, 1) * F.silu(wide(g_BTI))).to(x_BTI.dtype)
