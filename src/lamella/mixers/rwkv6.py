"""RWKV-6's time mix (Finch; Peng et al. 2024, arXiv 2404.05892): a matrix state a head, decays by token and channel.

    S_t = diag(w_t) S_{t-1} + k_t^T v_t        y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
    out = W_o (GroupNorm(y) * silu(g))        w = exp(-exp(w0 + B tanh(A x_w)))

r, k, v, g are projections of x_r, x_k, x_v, x_g; each x_i, x_w too, mixes a token with the one before it, by channel:

    x_i = x + (mu_i + B_i tanh(A_i (x + mu_x d))) d        d_t = x_{t-1} - x_t, of the same document

Initial values: BlinkDL/RWKV-LM, RWKV-v5/src/model.py (x060). Shapes: B batch, T time, D model width, H heads (split
over the tensor group), K head size, R rank of the mixes, I the channels of a rank.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lamella.config import Positive, change
from lamella.errors import UserError
from lamella.mixers.base import Mixer, MixerConfig, State
from lamella.nn.depth import Depth
from lamella.nn.flops import Flops
from lamella.nn.initializers import Initializer, by_channel, constant, orthogonal, uniform, zeros
from lamella.nn.linear import Column, Row
from lamella.nn.low_rank import LowRank
from lamella.nn.norm import HeadNorm
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide
from lamella.nn.shift import shift
from lamella_kernels.swiglu import swiglu
from lamella_kernels.wkv6 import wkv6

MIXES = ("w", "k", "v", "r", "g")
LARGEST = 30.0  # exp(-exp(30)) is 0 in fp64 too; beyond, the exponential would overflow


class Config(MixerConfig):
    mixer: Literal["rwkv6"]
    head_size: Positive = 64
    mix_rank: Positive = 32  # of each of the five mixes
    decay_rank: Positive = 64
    group_eps: Annotated[float, Field(gt=0)] = 64e-5

    def build(self, d_model: int, norm_eps: float, shard: Shard) -> "Rwkv6":
        return Rwkv6(self, d_model, shard, Depth())

    def build_at(self, d_model: int, norm_eps: float, shard: Shard, depth: Depth) -> "Rwkv6":
        return Rwkv6(self, d_model, shard, depth)

    def flops(self, d_model: int, length: int) -> Flops:
        weights = 5 * d_model**2 + d_model * 2 * (5 * self.mix_rank + self.decay_rank)
        # decay S, k v, their sum, r S: 5 a state; the bonus: 5 a channel; six mixes: 3 a channel each.
        scan = d_model * (5 * self.head_size + 5 + 18)
        return Flops(matmul=2 * length * weights, scan=length * scan)

    def shrink(self, tensor: int) -> "Config":
        return change(self, head_size=shrunk_head_size(tensor), mix_rank=4, decay_rank=4)


def shrunk_head_size(tensor: int) -> int:
    """Heads for every rank and two at least, at the width that `lamella verify` has."""
    return 16 // max(2, tensor) if 16 % tensor == 0 else 4


def heads_of(name: str, d_model: int, head_size: int, shard: Shard) -> int:
    """The number of heads. Raises UserError where sizes do not divide."""
    if d_model % head_size:
        raise UserError(f"{name}: d_model={d_model} does not divide by head_size={head_size}")
    heads = d_model // head_size
    if heads % shard.size:
        raise UserError(f"{name}: {heads} heads cannot be split over tensor={shard.size}; choose a divisor")
    return heads


class Rwkv6(Mixer):
    def __init__(self, config: Config, d_model: int, shard: Shard, depth: Depth):
        super().__init__()
        self.shard, self.head_size, rank = shard, config.head_size, config.mix_rank
        heads = heads_of("rwkv6", d_model, config.head_size, shard)
        mixes = {"x": 1.0, "w": 1.0, "k": 1.0, "v": 1.0, "r": 0.5, "g": 0.5}
        lift = {"v": 0.3 * depth.rising}
        self.mix = nn.ParameterDict(
            {
                name: shard.parameter((d_model,), start_of_mix(power * depth.falling, lift.get(name, 0.0)))
                for name, power in mixes.items()
            }
        )
        self.mix_down = shard.parameter((5 * rank, d_model), zeros)
        self.mix_up = shard.parameter((5, d_model, rank), uniform(0.01))
        w0 = by_channel(lambda n: 5 * (n / max(1, d_model - 1)) ** (0.7 + 1.3 * depth.rising) - 6)
        self.decay = LowRank(
            shard, d_model, config.decay_rank, d_model, activation=torch.tanh, init=uniform(0.01), bias=w0
        )
        self.bonus = shard.parameter(
            (heads, config.head_size),
            by_channel(lambda n: depth.rising * (1 - n / max(1, d_model - 1)) + 0.1 * ((n + 1) % 3 - 1)),
            split=0,
        )
        gains = {"receptance": 1.0, "key": 0.1, "value": 1.0, "gate": 0.1}
        self.receptance, self.key, self.value, self.gate = (
            Column(shard, d_model, d_model, init=orthogonal(gain), enter=False) for gain in gains.values()
        )
        self.group_norm = HeadNorm(shard, d_model, config.group_eps, constant(((depth.index + 1) / depth.count) ** 0.7))
        self.out = Row(shard, d_model, d_model, init=zeros)

    def forward(self, x_BTD: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        x_BTD = self.shard.enter(x_BTD)
        delta_BTD = shift(x_BTD, rows, state, "shift")
        mu = {name: self.shard.shared(p, "branch") for name, p in self.mix.items()}
        down = self.shard.shared(self.mix_down, "branch")
        x_wide, delta_wide = wide(x_BTD), wide(delta_BTD)
        h_BTR = torch.tanh(F.linear(torch.addcmul(x_wide, delta_wide, mu["x"].to(x_wide.dtype)), down.to(x_wide.dtype)))
        ups = self.shard.shared(self.mix_up, "branch").to(x_wide.dtype)
        mixed = {}
        for name, h, up in zip(MIXES, h_BTR.chunk(5, dim=-1), ups, strict=True):
            mixed[name] = rows.core(_mixed, x_wide, delta_wide, F.linear(h, up, mu[name].to(x_wide.dtype)))
        r, k, v, g = (
            projection(mixed[name].to(x_BTD.dtype))
            for projection, name in ((self.receptance, "r"), (self.key, "k"), (self.value, "v"), (self.gate, "g"))
        )
        return self.out(rows.core(self._core, r, k, v, g, self.decay(mixed["w"]), rows, state))

    def _core(
        self, r: Tensor, k: Tensor, v: Tensor, g_BTI: Tensor, d_BTI: Tensor, rows: Rows, state: State | None
    ) -> Tensor:
        log_w = -wide(d_BTI).clamp(max=LARGEST).exp()
        r, k, v, log_w = (t.unflatten(-1, (-1, self.head_size)) for t in (r, k, v, log_w))
        past_BHKV = None if state is None else state.get("wkv")
        y_BTHK, state_BHKV = wkv6(
            r,
            k,
            v,
            log_w,
            wide(self.bonus),
            reset_BT=rows.reset_BT,
            initial_state_BHKV=past_BHKV,
            return_state=True,
        )
        if state is not None:
            state["wkv"] = state_BHKV
        return swiglu(wide(g_BTI), self.group_norm(wide(y_BTHK))).to(g_BTI.dtype)


def _mixed(x_BTD: Tensor, delta_BTD: Tensor, mu_BTD: Tensor) -> Tensor:
    return torch.addcmul(x_BTD, delta_BTD, mu_BTD)


def start_of_mix(power: float, lift: float = 0.0) -> Initializer:
    """1 - (n / D)^power - lift for channel n of D: early channels look back, and the more so the lower the layer."""
    return by_channel(lambda n: 1 - (n / len(n)) ** power - lift)
