"""RWKV-7's time mix (Goose; Peng et al. 2025, arXiv 2503.14456): a matrix state a head under a generalised delta rule.

    S_t = S_{t-1} (diag(w_t) - kk_t (kk_t * a_t)^T) + v_t k_t^T        y_t = S_t r_t
    out = W_o ((GroupNorm(y) + (sum r * k * r_k) v) * g)
    w = exp(-exp(-1/2) sigmoid(w0 + B tanh(A x_w)))        a = sigmoid(a0 + B A x_a)        g = B sigmoid(A x_g)
    kk = normalised k * k_k        k <- k (1 + (a - 1) k_a)        v <- v + (v_first - v) sigmoid(v0 + B A x_v)

x_i = x + mu_i (x_{t-1} - x) of the same document, for r, w, k, v, a, g. v_first are the values of the first such layer,
which has no v0, A and B of its own. w is above exp(-exp(-1/2)) = 0.545.

Initial values: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py (x070). Shapes: B batch, T time, D model width, H heads
(split over the tensor group), K head size, I the channels of a rank.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lamella.config import Positive, change
from lamella.mixers.base import Mixer, MixerConfig, State
from lamella.mixers.rwkv6 import heads_of, shrunk_head_size, start_of_mix
from lamella.nn.depth import Depth
from lamella.nn.flops import Flops
from lamella.nn.initializers import by_channel, constant, orthogonal, zeros
from lamella.nn.linear import Column, Row
from lamella.nn.low_rank import LowRank
from lamella.nn.norm import HeadNorm
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide
from lamella.nn.shift import shift
from lamella_kernels.wkv7 import wkv7

FIRST_VALUES = "rwkv7_values"  # what the first layer carries
MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # the powers that their initial values have
FASTEST = math.exp(-0.5)  # the largest -log w


class Config(MixerConfig):
    """Ranks that are None follow the width as those published do: 64, 64, 32, 128 at 768; 96, 96, 64, 320 at 2560.

    The published model of width 1024 has a gate of rank 128, where the rule says 160.
    """

    mixer: Literal["rwkv7"]
    head_size: Positive = 64
    decay_rank: Positive | None = None
    rate_rank: Positive | None = None  # of a
    value_rank: Positive | None = None  # of the value residual
    gate_rank: Positive | None = None
    group_eps: Annotated[float, Field(gt=0)] = 64e-5

    def ranks(self, d_model: int) -> tuple[int, int, int, int]:
        """Of the decay, of a, of the value residual, of the gate."""
        root = d_model**0.5
        wanted = (1.8 * root, 1.8 * root, 1.3 * root, 0.6 * d_model**0.8)
        given = (self.decay_rank, self.rate_rank, self.value_rank, self.gate_rank)
        decay, rate, value, gate = (n or max(32, round(x / 32) * 32) for n, x in zip(given, wanted, strict=True))
        return decay, rate, value, gate

    def build(self, d_model: int, norm_eps: float, shard: Shard) -> "Rwkv7":
        return Rwkv7(self, d_model, shard, Depth())

    def build_at(self, d_model: int, norm_eps: float, shard: Shard, depth: Depth) -> "Rwkv7":
        return Rwkv7(self, d_model, shard, depth)

    def carries(self, d_model: int) -> dict[str, int]:
        return {FIRST_VALUES: d_model}

    def flops(self, d_model: int, length: int) -> Flops:
        decay, rate, _, gate = self.ranks(d_model)
        weights = 4 * d_model**2 + 2 * d_model * (decay + rate + gate)
        # decay S, S a, (S a) b, v k, two sums, S r: 8 a state; six mixes: 2 a channel each; kk, k, v, bonus: 14.
        scan = d_model * (8 * self.head_size + 12 + 14)
        return Flops(matmul=2 * length * weights, scan=length * scan)

    def flops_at(self, d_model: int, length: int, depth: Depth) -> Flops:
        residual = FIRST_VALUES in depth.carried
        return self.flops(d_model, length) + Flops(matmul=residual * 4 * length * d_model * self.ranks(d_model)[2])

    def shrink(self, tensor: int) -> "Config":
        return change(
            self, head_size=shrunk_head_size(tensor), decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4
        )


class Rwkv7(Mixer):
    def __init__(self, config: Config, d_model: int, shard: Shard, depth: Depth):
        super().__init__()
        self.shard, self.head_size = shard, config.head_size
        heads = heads_of("rwkv7", d_model, config.head_size, shard)
        self.mix = nn.ParameterDict(
            {
                name: shard.parameter((d_model,), start_of_mix(power * depth.falling))
                for name, power in MIXES.items()
            }
        )

        def linear(n: Tensor) -> Tensor:
            return n / max(1, d_model - 1) - 0.5

        def zigzag(n: Tensor) -> Tensor:
            middle = (config.head_size - 1) / 2
            z = (n % config.head_size - middle) / max(middle, 1)
            return z * z.abs()

        def w0(n: Tensor) -> Tensor:
            return 6 * (linear(n) + 0.5) ** (1 + depth.rising**0.3) - 5.5 + 2.5 * zigzag(n)

        decay, rate, value, gate = config.ranks(d_model)
        self.decay = low_rank(shard, d_model, decay, activation=torch.tanh, bias=by_channel(w0))
        a0 = by_channel(lambda n: 0.3 * zigzag(n) + 0.4 * linear(n) - 0.19)
        self.rate = low_rank(shard, d_model, rate, bias=a0)
        first = FIRST_VALUES not in depth.carried
        v0 = by_channel(lambda n: 0.73 - 0.4 * linear(n))
        self.value_residual = None if first else low_rank(shard, d_model, value, bias=v0)
        self.gate = low_rank(shard, d_model, gate, activation=torch.sigmoid)
        self.k_k = shard.parameter((d_model,), by_channel(lambda n: 0.71 - 0.1 * linear(n)), split=0)
        self.k_a = shard.parameter((d_model,), constant(1.02), split=0)
        self.r_k = shard.parameter((heads, config.head_size), constant(-0.04), split=0)
        self.receptance, self.key, self.value = (
            Column(shard, d_model, d_model, init=orthogonal(gain), enter=False) for gain in (1.0, 0.1, 1.0)
        )
        self.group_norm = HeadNorm(shard, d_model, config.group_eps, constant(((depth.index + 1) / depth.count) ** 0.7))
        self.out = Row(shard, d_model, d_model, init=zeros)

    def forward(self, x_BTD: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        x_BTD = self.shard.enter(x_BTD)
        delta_BTD = shift(x_BTD, rows, state, "shift")
        x = {name: rows.core(_mixed, x_BTD, delta_BTD, self.shard.shared(p, "branch")) for name, p in self.mix.items()}
        narrow = {name: x[name].to(x_BTD.dtype) for name in "rkv"}
        r, k, v = self.receptance(narrow["r"]), self.key(narrow["k"]), self.value(narrow["v"])
        if self.value_residual is None:
            rows.carried[FIRST_VALUES] = v
        else:
            share = torch.sigmoid(self.value_residual(x["v"]))
            v = (wide(v) + (wide(rows.carried[FIRST_VALUES]) - wide(v)) * share).to(v.dtype)
        d, a, g = self.decay(x["w"]), self.rate(x["a"]), self.gate(x["g"])
        return self.out(rows.core(self._core, r, k, v, d, a, g, rows, state))

    def _core(
        self,
        r_BTI: Tensor,
        k_BTI: Tensor,
        v_BTI: Tensor,
        d_BTI: Tensor,
        a_BTI: Tensor,
        g_BTI: Tensor,
        rows: Rows,
        state: State | None,
    ) -> Tensor:
        log_w_BTI, a_BTI, k_BTI = -FASTEST * torch.sigmoid(d_BTI), torch.sigmoid(a_BTI), wide(k_BTI)
        kk_BTI, k_BTI = k_BTI * self.k_k, k_BTI * (1 + (a_BTI - 1) * self.k_a)
        r, log_w, k, v, a, kk = (
            t.unflatten(-1, (-1, self.head_size)) for t in (wide(r_BTI), log_w_BTI, k_BTI, v_BTI, a_BTI, kk_BTI)
        )
        kk = F.normalize(kk, dim=-1)
        past_BHVK = None if state is None else state.get("wkv")
        y_BTHV, state_BHVK = wkv7(
            r.to(v.dtype),
            log_w,
            k.to(v.dtype),
            v,
            -kk.to(v.dtype),
            (kk * a).to(v.dtype),
            reset_BT=rows.reset_BT,
            initial_state_BHVK=past_BHVK,
            return_state=True,
        )
        if state is not None:
            state["wkv"] = state_BHVK
        bonus_BTHV = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return ((self.group_norm(wide(y_BTHV)) + bonus_BTHV.flatten(2)) * g_BTI).to(v_BTI.dtype)


def _mixed(x_BTD: Tensor, delta_BTD: Tensor, mu_D: Tensor) -> Tensor:
    x, delta = wide(x_BTD), wide(delta_BTD)
    return torch.addcmul(x, delta, mu_D.to(x.dtype))


def low_rank(shard: Shard, d_model: int, rank: int, **options) -> LowRank:
    gain = 0.1 * max(1.0, rank / d_model) ** 0.5
    return LowRank(shard, d_model, rank, d_model, init=orthogonal(gain), **options)
