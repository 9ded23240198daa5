"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): SSD, one decay a head, B and C shared by the heads of a group.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        out = W norm(y * silu(z))

(z, x, B, C, dt) is one projection, (x, B, C) go through one short convolution, and the norm is RMS over each group's
channels, after the gate.

More ranks than groups: a rank projects and convolves its share of every group's B and C; the shares are summed into
the whole, as are the norm's sums of squares, so that nothing is computed twice or differently.

B batch, T time, D model, H heads and I = H*P inner channels (split over the tensor group), P head size, G groups, N
state, S a rank's share of G*N.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lamella.config import Positive, change
from lamella.errors import UserError
from lamella.mixers.base import Mixer, MixerConfig, State
from lamella.nn.conv import CausalConv1d
from lamella.nn.flops import Flops
from lamella.nn.initializers import inverse_softplus_of_log_uniform, log_of_uniform, ones
from lamella.nn.linear import Column, Row
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide
from lamella_kernels.rmsnorm import rmsnorm
from lamella_kernels.ssd import ssd
from lamella_kernels.swiglu import swiglu


class Config(MixerConfig):
    mixer: Literal["mamba2"]
    d_state: Positive = 128
    d_conv: Annotated[int, Field(ge=2)] = 4
    expand: Positive = 2
    head_dim: Positive = 64
    num_heads: Positive | None = None  # None: expand * d_model / head_dim
    num_groups: Positive = 1  # of heads that share B and C

    def sizes(self, d_model: int) -> tuple[int, int]:
        """H, I. Raises UserError where they do not divide."""
        if self.num_heads is None and self.expand * d_model % self.head_dim:
            raise UserError(
                f"mamba2: {self.expand * d_model} inner channels do not divide by head_dim={self.head_dim}; set it"
            )
        heads = self.num_heads or self.expand * d_model // self.head_dim
        if heads % self.num_groups:
            raise UserError(f"mamba2: num_heads={heads} is not a multiple of num_groups={self.num_groups}")
        return heads, heads * self.head_dim

    def build(self, d_model: int, norm_eps: float, shard: Shard) -> "Mamba2":
        return Mamba2(self, d_model, norm_eps, shard)

    def flops(self, d_model: int, length: int) -> Flops:
        heads, inner = self.sizes(d_model)
        shared = self.num_groups * self.d_state
        weights = d_model * (2 * inner + 2 * shared + heads) + inner * d_model
        # Of the recurrence, whatever form computes it. Decay h, (dt x) B, their sum: 3 a state; C h: 2 a state; dt x,
        # D x and its sum: 3 a channel; dt A and its exponential: 2 a head; the convolution: 2 a tap.
        scan = inner * (5 * self.d_state + 3) + 2 * heads + 2 * self.d_conv * (inner + 2 * shared)
        return Flops(matmul=2 * length * weights, scan=length * scan)

    def shrink(self, tensor: int) -> "Config":
        groups = self.num_groups
        if groups % tensor == 0 or tensor % groups == 0:
            groups = next(g for g in (2 * tensor, tensor, groups) if self.num_groups % g == 0)
        # A norm over a single head takes D's gradient away, and gradients of few heads are mostly rounding.
        heads = 8 * max(tensor, groups)
        return change(self, num_heads=heads, head_dim=4, d_state=max(8, tensor), num_groups=groups)


class Mamba2(Mixer):
    def __init__(self, config: Config, d_model: int, norm_eps: float, shard: Shard):
        super().__init__()
        heads, inner = config.sizes(d_model)
        groups, shared = config.num_groups, config.num_groups * config.d_state
        if heads % shard.size:
            raise UserError(f"mamba2: num_heads={heads} cannot be split over tensor={shard.size}; choose a divisor")
        if groups % shard.size and shard.size % groups:
            raise UserError(
                f"mamba2: num_groups={groups} cannot be split over tensor={shard.size}; choose a divisor or a multiple"
            )
        self.config, self.shard = config, shard
        self.ranks = max(shard.size // groups, 1)  # that share a group
        self.in_proj = Column(shard, d_model, (inner, inner, shared, shared, heads))
        self.conv = CausalConv1d(shard, (inner, shared, shared), config.d_conv)
        self.A_log = shard.parameter((heads,), log_of_uniform(1, 16), split=0)
        self.D = shard.parameter((heads,), ones, split=0)
        self.dt_bias = shard.parameter((heads,), inverse_softplus_of_log_uniform(1e-3, 0.1), split=0)
        self.norm = GroupNorm(shard, groups, inner, norm_eps)
        self.out_proj = Row(shard, inner, d_model)

    def forward(self, x_BTD: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        z_BTI, x_BTI, B_BTS, C_BTS, dt_BTH = self.in_proj(x_BTD)
        sizes = x_BTI.shape[-1], B_BTS.shape[-1], C_BTS.shape[-1]
        mixed = rows.core(self.conv, torch.cat([x_BTI, B_BTS, C_BTS], -1), rows, state)
        x_BTI, B_BTS, C_BTS = mixed.split(sizes, -1)
        B_BTGN, C_BTGN = self._groups(B_BTS, C_BTS)
        y_BTI = rows.core(self._scan, x_BTI, dt_BTH, B_BTGN, C_BTGN, rows, state)
        return self.out_proj(self.norm(y_BTI, z_BTI))

    def _groups(self, B_BTS: Tensor, C_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """B and C of the groups that this rank's heads belong to."""
        n = self.config.d_state
        if self.ranks > 1:
            rank, size = self.shard.rank, self.shard.size
            own_BT1S = torch.cat([B_BTS, C_BTS], -1).unsqueeze(-2)
            whole = F.pad(own_BT1S, (0, 0, rank, size - 1 - rank))  # [B, T, tensor, 2 S]: the others' shares are 0
            whole = self.shard.copy(self.shard.sum(whole))
            group = slice(rank // self.ranks * self.ranks, (rank // self.ranks + 1) * self.ranks)
            B_BTS, C_BTS = (t.flatten(-2) for t in whole[..., group, :].chunk(2, -1))
        return B_BTS.unflatten(-1, (-1, n)), C_BTS.unflatten(-1, (-1, n))

    def _scan(
        self,
        x_BTI: Tensor,
        dt_BTH: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        rows: Rows,
        state: State | None,
    ) -> Tensor:
        x_BTHP = x_BTI.unflatten(-1, (-1, self.config.head_dim))
        dt_BTH = F.softplus(wide(dt_BTH) + wide(self.dt_bias))
        inputs = x_BTHP, dt_BTH, -wide(self.A_log).exp(), B_BTGN, C_BTGN, wide(self.D)
        past_BHPN = None if state is None else state.get("h")
        if past_BHPN is not None and x_BTI.shape[1] == 1:
            y_BTHP, h_BHPN = _step(*inputs, rows.reset_BT, past_BHPN)
        else:
            y_BTHP, h_BHPN = ssd(*inputs, reset_BT=rows.reset_BT, initial_state_BHPN=past_BHPN, return_state=True)
        if state is not None:
            state["h"] = h_BHPN
        return y_BTHP.flatten(2)


def _step(
    x_B1HP: Tensor,
    dt_B1H: Tensor,
    A_H: Tensor,
    B_B1GN: Tensor,
    C_B1GN: Tensor,
    D_H: Tensor,
    reset_B1: Tensor,
    h_BHPN: Tensor,
) -> tuple[Tensor, Tensor]:
    """The equation for one token, without the calls that make many fast. A group's heads lie in one dim, J * P."""
    groups, states = B_B1GN.shape[2:]
    x_BHP, dt_BH1 = wide(x_B1HP[:, 0]), dt_B1H.mT
    decay_BH1 = (dt_BH1 * A_H[:, None]).exp() * ~reset_B1[:, :, None]
    input_BGV1 = (dt_BH1 * x_BHP).view(len(x_BHP), groups, -1, 1)
    B_BG1N, C_BGN1 = wide(B_B1GN).transpose(1, 2), wide(C_B1GN).permute(0, 2, 3, 1)
    before_BGVN = (decay_BH1[..., None] * h_BHPN).view(len(x_BHP), groups, -1, states)
    h_BGVN = torch.addcmul(before_BGVN, input_BGV1, B_BG1N)
    y_BHP = (h_BGVN @ C_BGN1).view_as(x_BHP) + D_H[:, None] * x_BHP
    return y_BHP.unsqueeze(1).to(x_B1HP.dtype), h_BGVN.view_as(h_BHPN)


class GroupNorm(nn.Module):
    """norm(y silu(z)) w, RMS over each group of the split channels, in fp32; ranks that share a group sum up."""

    def __init__(self, shard: Shard, groups: int, width: int, eps: float):
        super().__init__()
        self.shard, self.groups, self.width, self.eps = shard, groups, width // groups, eps
        self.weight = shard.parameter((width,), ones, split=0)

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        ranks = self.shard.size // self.groups
        if ranks <= 1:
            return rmsnorm(y_BTI, self.weight, eps=self.eps, width=self.width, gate=z_BTI)  # type: ignore[return-value]
        x_BTI = swiglu(wide(z_BTI), wide(y_BTI))
        group = self.shard.rank // ranks
        square_BT1 = x_BTI.square().sum(-1, keepdim=True)
        square_BTG = F.pad(square_BT1, (group, self.groups - 1 - group))  # the other groups' sums are 0
        square_BT1 = self.shard.copy(self.shard.sum(square_BTG))[..., group : group + 1]
        return (x_BTI * torch.rsqrt(square_BT1 / self.width + self.eps) * wide(self.weight)).to(y_BTI.dtype)
