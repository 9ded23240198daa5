"""Mamba-1 (Gu & Dao 2023, arXiv 2312.00752), with Jamba's norms on dt, B and C (arXiv 2403.19887) as an option.

Falcon Mamba (Zuo et al. 2024, arXiv 2410.05355) has these norms without weights.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t

B batch, T time, D model, I inner channels (split over the tensor group), N state, R rank of dt.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamella.config import Positive, change
from lamella.errors import UserError
from lamella.mixers.base import Mixer, MixerConfig, State
from lamella.nn.conv import CausalConv1d
from lamella.nn.flops import Flops
from lamella.nn.initializers import inverse_softplus_of_log_uniform, log_arange, ones, uniform
from lamella.nn.linear import Column, Row
from lamella.nn.norm import PlainRMSNorm, RMSNorm
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide
from lamella_kernels.selective_scan import selective_scan
from lamella_kernels.swiglu import swiglu


class Config(MixerConfig):
    mixer: Literal["mamba"]
    d_state: Positive = 16
    d_conv: Annotated[int, Field(ge=2)] = 4
    expand: Positive = 2
    dt_rank: Positive | None = None  # None: d_model / 16, rounded up
    norms: bool = True  # RMSNorm on dt, B and C, as Jamba has them
    norm_weights: bool = True  # of these norms; Falcon Mamba's have none
    norms_eps: Annotated[float, Field(gt=0)] | None = None  # of these norms; None: the model's norm_eps

    def rank(self, d_model: int) -> int:
        return self.dt_rank or -(-d_model // 16)

    def build(self, d_model: int, norm_eps: float, shard: Shard) -> "Mamba":
        return Mamba(self, d_model, norm_eps, shard)

    def flops(self, d_model: int, length: int) -> Flops:
        inner, rank, n = self.expand * d_model, self.rank(d_model), self.d_state
        weights = d_model * 2 * inner + inner * (rank + 2 * n) + rank * inner + inner * d_model
        # dt A and its exponential, decay h, (dt x) B, their sum: 5 a state; C h: 2 a state; dt x, D x and its sum: 3;
        # the convolution: 2 a tap.
        scan = inner * (7 * n + 3 + 2 * self.d_conv)
        return Flops(matmul=2 * length * weights, scan=length * scan)

    def shrink(self, tensor: int) -> "Config":
        return change(self, d_state=min(self.d_state, 16), dt_rank=16)  # norms over fewer channels amplify rounding


class Mamba(Mixer):
    def __init__(self, config: Config, d_model: int, norm_eps: float, shard: Shard):
        super().__init__()
        inner, rank, n = config.expand * d_model, config.rank(d_model), config.d_state
        if inner % shard.size:
            raise UserError(f"mamba: {inner} inner channels cannot be split over tensor={shard.size}; choose a divisor")
        self.shard, self.sizes = shard, (rank, n, n)
        self.in_proj = Column(shard, d_model, (inner, inner))
        self.conv = CausalConv1d(shard, inner, config.d_conv)
        self.x_proj = Row(shard, inner, rank + 2 * n, into="branch")
        self.dt_norm, self.B_norm, self.C_norm = (_norm(config, shard, width, norm_eps) for width in self.sizes)
        dt_bias = inverse_softplus_of_log_uniform(1e-3, 0.1)
        self.dt_proj = Column(shard, rank, inner, bias=dt_bias, init=uniform(rank**-0.5), enter=False)
        self.A_log = shard.parameter((inner, n), log_arange, split=0)
        self.D = shard.parameter((inner,), ones, split=0)
        self.out_proj = Row(shard, inner, d_model)

    def forward(self, x_BTD: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        x_BTI, z_BTI = self.in_proj(x_BTD)
        x_BTI = rows.core(self.conv, x_BTI, rows, state)
        dt_BTR, B_BTN, C_BTN = self.x_proj(x_BTI).split(self.sizes, dim=-1)
        if self.dt_norm is not None and self.B_norm is not None and self.C_norm is not None:
            dt_BTR, B_BTN, C_BTN = self.dt_norm(dt_BTR), self.B_norm(B_BTN), self.C_norm(C_BTN)
        dt_BTR, B_BTN, C_BTN = (self.shard.copy(t) for t in (dt_BTR, B_BTN, C_BTN))
        dt_BTI = self.dt_proj(wide(dt_BTR))
        y_BTI = rows.core(self._scan, x_BTI, dt_BTI, B_BTN, C_BTN, z_BTI, rows, state)
        return self.out_proj(y_BTI)

    def _scan(
        self,
        x_BTI: Tensor,
        dt_BTI: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        z_BTI: Tensor,
        rows: Rows,
        state: State | None,
    ) -> Tensor:
        inputs = x_BTI, F.softplus(dt_BTI), -wide(self.A_log).exp(), B_BTN, C_BTN, wide(self.D)
        past_BIN = None if state is None else state.get("h")
        if past_BIN is not None and x_BTI.shape[1] == 1:
            y_BTI, h_BIN = _step(*inputs, rows.reset_BT, past_BIN)
        else:
            y_BTI, h_BIN = selective_scan(
                *inputs, reset_BT=rows.reset_BT, initial_state_BIN=past_BIN, return_state=True
            )
        if state is not None:
            state["h"] = h_BIN
        return swiglu(z_BTI, y_BTI)


def _norm(config: Config, shard: Shard, width: int, norm_eps: float) -> RMSNorm | PlainRMSNorm | None:
    """Of dt, B or C."""
    eps = config.norms_eps or norm_eps
    if not config.norms:
        return None
    return RMSNorm(shard, width, eps, "copied") if config.norm_weights else PlainRMSNorm(eps)


def _step(
    x_B1I: Tensor,
    dt_B1I: Tensor,
    A_IN: Tensor,
    B_B1N: Tensor,
    C_B1N: Tensor,
    D_I: Tensor,
    reset_B1: Tensor,
    h_BIN: Tensor,
) -> tuple[Tensor, Tensor]:
    """The equation for one token, without the calls that make a scan over many fast."""
    x_BI1, dt_BI1 = wide(x_B1I).mT, dt_B1I.mT
    decay_BIN = (dt_BI1 * A_IN).exp() * ~reset_B1[:, :, None]
    h_BIN = torch.addcmul(decay_BIN * h_BIN, dt_BI1 * x_BI1, wide(B_B1N))
    y_BI1 = h_BIN @ wide(C_B1N).mT + D_I[:, None] * x_BI1
    return y_BI1.mT.to(x_B1I.dtype), h_BIN
