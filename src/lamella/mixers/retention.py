"""Multi-scale retention (Sun et al. 2023, RetNet, arXiv 2307.08621; the reference implementation is torchscale).

    S_t = gamma_h S_{t-1} + k_t v_t^T        z_t = gamma_h z_{t-1} + k_t        w_t = gamma_h w_{t-1} + 1
    o_t = q_t S_t / max(sqrt(w_t), |q_t . z_t|)        y_t = W_o (swish(W_g x_t) * RMS_h(o_t))

with gamma_h = 1 - 2^(-5-h), h from 0 over all heads, q and k rotated by the position inside the document, pairs of
neighbours (2i, 2i+1) by the angle 10000^(-i / (K/2 - 1)), k scaled by K^(-1/2), RMS_h over a head's values without a
weight. The divisor is what the paper's two normalisations of D and of the scores come to, in every form; no gradient
passes it (`lamella_kernels/linear_attention`). torchscale's chunkwise and recurrent forms divide by something else or
not at all, and its releases since November 2023 by the sum of absolute scores: after RMS_h all these are the same but
for its epsilon.

`variant: fla` is flash-linear-attention's layer: rotary positions as in attention (halves, theta 10000), no divisor,
RMS_h with one weight for all heads, the model's initial values in place of RetNet's. It has `gate: false`, which is
y_t = W_o RMS_h(o_t), and `norm_weight`, whether RMS_h has a weight; so have both variants here.

B batch, T time, D model width, H heads (split over the tensor group), K size of a query and key, V of a value.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from lamella.config import Positive, change
from lamella.errors import UserError
from lamella.mixers.base import Mixer, MixerConfig, State
from lamella.nn.flops import Flops
from lamella.nn.initializers import Initializer, uniform
from lamella.nn.linear import Column, Row
from lamella.nn.norm import RMSNorm
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide
from lamella_kernels.linear_attention import State as Past
from lamella_kernels.linear_attention import linear_attention
from lamella_kernels.rmsnorm import rmsnorm
from lamella_kernels.rotary import rotary


class Config(MixerConfig):
    mixer: Literal["retention"]
    num_heads: Positive
    head_dim: Positive | None = None  # of queries and keys; None: d_model / num_heads
    value_head_dim: Positive | None = None  # None: 2 head_dim
    group_eps: Annotated[float, Field(gt=0)] | None = None  # of the norm of heads; None: norm_eps
    variant: Literal["retnet", "fla"] = "retnet"  # fla: plain rotary, weights in the norm, scores as they are
    norm_weight: bool | None = None  # in the norm of heads; None: as the variant has it
    gate: bool = True  # the normed heads times swish(W_g x)

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """H, K, V. Raises UserError where they do not divide."""
        if self.head_dim is None and d_model % self.num_heads:
            raise UserError(
                f"retention: d_model={d_model} does not divide by num_heads={self.num_heads}; set head_dim"
            )
        keys = self.head_dim or d_model // self.num_heads
        if keys % 2:
            raise UserError(f"retention: rotary positions need an even head_dim, got {keys}")
        return self.num_heads, keys, self.value_head_dim or 2 * keys

    def build(self, d_model: int, norm_eps: float, shard: Shard) -> "Retention":
        return Retention(self, d_model, norm_eps, shard)

    def flops(self, d_model: int, length: int) -> Flops:
        heads, keys, values = self.sizes(d_model)
        # gamma S, k v, their sum, q S: 5 a number of S; gamma z and its sum, q z: 4 a key.
        scan = heads * (5 * keys * values + (4 * keys if self.variant == "retnet" else 0))
        weights = d_model * heads * (2 * keys + (3 if self.gate else 2) * values)
        return Flops(matmul=2 * length * weights, scan=length * scan)

    def shrink(self, tensor: int) -> "Config":
        # The norm blows up the rounding of outputs that nearly cancel, up to its epsilon.
        return change(self, num_heads=2 * tensor, head_dim=4, value_head_dim=8, group_eps=1e-2)


class Retention(Mixer):
    def __init__(self, config: Config, d_model: int, norm_eps: float, shard: Shard):
        super().__init__()
        heads, keys, values = config.sizes(d_model)
        if heads % shard.size:
            raise UserError(f"retention: num_heads={heads} cannot be split over tensor={shard.size}; choose a divisor")
        self.shard, self.keys, self.values = shard, keys, values
        self.eps = config.group_eps or norm_eps
        segments = (heads * keys, heads * keys, *[heads * values] * (2 if config.gate else 1))
        self.published = published = config.variant == "retnet"
        inputs = Column(shard, d_model, segments, init=_xavier(segments, d_model) if published else None)
        self.qkvg, self.qkv = (inputs, None) if config.gate else (None, inputs)
        weighted = not published if config.norm_weight is None else config.norm_weight
        self.norm = RMSNorm(shard, values, self.eps, "branch") if weighted else None
        bound = 0.5 * math.sqrt(6 / (heads * values + d_model))
        self.out = Row(shard, heads * values, d_model, init=uniform(bound) if published else None)

    def forward(self, x_BTD: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        inputs = self.qkvg or self.qkv
        assert inputs is not None
        return self.out(rows.core(self._retain, rows, state, *inputs(x_BTD)))

    def _retain(
        self, rows: Rows, state: State | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None
    ) -> Tensor:
        q, k = (wide(t).unflatten(-1, (-1, self.keys)) for t in (q, k))
        v = v.unflatten(-1, (-1, self.values))
        k = k * self.keys**-0.5
        if self.published:
            cos, sin = _angles(rows.position_BT, self.keys)
            q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        else:
            q, k = (rotary(t, rows.position_BT, theta=1e4) for t in (q, k))
        stream = v.dtype
        q, k = q.to(stream), k.to(stream)
        log_H = log_decays(self.shard.rank, q.shape[2], q.device)
        past = Past(state["kv"], state.get("keys"), state.get("weight")) if state else None
        if past is not None and q.shape[1] == 1:
            q, k, v = wide(q), wide(k), wide(v)
            y, after = _step(q[:, 0], k[:, 0], v[:, 0], log_H, rows.reset_BT, past, self.published)
        else:
            found = linear_attention(
                q,
                k,
                v,
                log_H,
                normalize=self.published,
                reset_BT=rows.reset_BT,
                initial_state=past,
                return_state=state is not None,
            )
            y, after = found if isinstance(found, tuple) else (found, ())
        if state is not None:
            state.update((n, t) for n, t in zip(("kv", "keys", "weight"), after, strict=True) if t is not None)
        weight = None if self.norm is None else self.norm.shared_weight().repeat(y.shape[2])
        y = y.to(stream).flatten(2)
        return rmsnorm(y, weight, eps=self.eps, width=self.values, gate=g, gate_first=False)  # type: ignore[return-value]


def log_decays(rank: int, heads: int, device: torch.device) -> Tensor:
    """log(1 - 2^(-5-h)) in fp64 for the h of this rank's heads among all."""
    h = torch.arange(rank * heads, (rank + 1) * heads, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(-5 - h))


def _angles(position_BT: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, K / 2] in fp64 of the angles position * 10000^(-i / (K / 2 - 1))."""
    i = torch.linspace(0, 1, keys // 2, device=position_BT.device, dtype=torch.float64)
    angle = position_BT[..., None, None].double() * 1e4**-i
    return angle.cos(), angle.sin()


def _turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_2i, x_2i+1) turned by its angle. All first members come before all second ones, which no product
    of a query and a key sees.
    """
    a, b = x_BTHK[..., ::2], x_BTHK[..., 1::2]
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_H: Tensor, reset_B1: Tensor, past: Past, normalize: bool
) -> tuple[Tensor, Past]:
    """The equation for one token, [B, 1, H, V], without the calls that make many fast."""
    decay_BH = log_H.exp().to(q_BHK.dtype) * ~reset_B1
    kv_BHKV = torch.addcmul(decay_BH[..., None, None] * past.kv_BHKV, k_BHK.unsqueeze(-1), v_BHV.unsqueeze(-2))
    y_B1HV = (q_BHK.unsqueeze(-2) @ kv_BHKV).transpose(1, 2)
    if not normalize:
        return y_B1HV, Past(kv_BHKV)
    assert past.keys_BHK is not None and past.weight_BH is not None
    keys_BHK = torch.addcmul(k_BHK, decay_BH.unsqueeze(-1), past.keys_BHK)
    weight_BH = decay_BH * past.weight_BH + 1
    divisor_BH = torch.maximum(weight_BH.sqrt(), (q_BHK * keys_BHK).sum(-1).abs())
    return y_B1HV / divisor_BH[:, None, :, None], Past(kv_BHKV, keys_BHK, weight_BH)


def _xavier(segments: tuple[int, ...], d_in: int) -> Initializer:
    """Glorot's uniform bound with RetNet's gain 2^-2.5, for each of the fused matrices."""

    def draw(generator: Generator, shape: tuple[int, ...]) -> Tensor:
        bounds = [torch.full((n, 1), 2**-2.5 * math.sqrt(6 / (n + d_in))) for n in segments]
        return uniform(1.0)(generator, shape) * torch.cat(bounds)

    return draw
