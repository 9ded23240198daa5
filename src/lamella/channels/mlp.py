"""The dense channel mixer: gated (SwiGLU, GEGLU; Shazeer 2020, arXiv 2002.05202) or plain.

    swiglu: W_out (silu(W_gate x) * W_up x)        geglu: gelu for silu        else: W_out act(W_in x)

relu2 is relu squared (So et al. 2021, arXiv 2109.08668).
"""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from lamella.channels.base import Channel, ChannelConfig
from lamella.config import Positive, change
from lamella.nn.flops import Flops
from lamella.nn.initializers import zeros
from lamella.nn.linear import Column, Row
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard
from lamella_kernels.swiglu import swiglu

Activation = Literal["swiglu", "geglu", "gelu", "relu", "relu2"]
GATED = ("swiglu", "geglu")


def activate(kind: Activation, h: Tensor) -> Tensor:
    """The input projection's [..., F] or, of the gated kinds, [..., 2 F] with the gates first -> [..., F]."""
    if kind == "swiglu":
        return swiglu(h)
    if kind == "geglu":
        gate, up = h.chunk(2, -1)
        return F.gelu(gate) * up
    if kind == "relu2":
        return F.relu(h).square()
    return F.gelu(h) if kind == "gelu" else F.relu(h)


def hidden_segments(kind: Activation, d_ff: int) -> tuple[int, ...]:
    """The segments of the input projection."""
    return (d_ff, d_ff) if kind in GATED else (d_ff,)


class Config(ChannelConfig):
    channel: Literal["mlp"]
    d_ff: Positive
    activation: Activation = "swiglu"
    bias: bool = False  # on both projections

    def build(self, d_model: int, shard: Shard, place: str) -> "Mlp":
        return Mlp(self, d_model, shard)

    def flops(self, d_model: int, length: int) -> Flops:
        return mlp_flops(self.activation, d_model, self.d_ff, length)

    def shrink(self, tensor: int, expert: int) -> "Config":
        return change(self, d_ff=8 * tensor)


def mlp_flops(kind: Activation, d_model: int, d_ff: int, tokens: int) -> Flops:
    return Flops(matmul=2 * tokens * d_model * d_ff * (len(hidden_segments(kind, d_ff)) + 1))


class Mlp(Channel):
    def __init__(self, config: Config, d_model: int, shard: Shard):
        super().__init__()
        self.activation: Activation = config.activation
        segments, bias = hidden_segments(config.activation, config.d_ff), zeros if config.bias else None
        self.w_in = Column(shard, d_model, segments, bias=bias)
        self.w_out = Row(shard, config.d_ff, d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor, rows: Rows, state: dict[str, Any] | None = None) -> Tensor:
        return self.w_out(rows.core(activate, self.activation, self.w_in.joined(x_BTD)))
