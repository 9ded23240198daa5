"""Softmax attention (Vaswani et al. 2017) inside documents: grouped queries, optional RoPE, QK-norm, sliding window.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s        over s <= t of t's document (and s > t - window)

Each document is attended by itself (`lamella_kernels/attention`). Grouped queries: Ainslie et al. 2023 (arXiv
2305.13245). QK-norm: Henry et al. 2020 (2010.04245). Value residual: Zhou et al. 2024 (2410.17897), with both weights
1/2.

Shapes: B batch, T time, D model width, H query heads, G key-value heads, K head size, L tokens of one document.
"""

import itertools
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamella.config import Positive, change
from lamella.errors import UserError
from lamella.mixers.base import Mixer, MixerConfig, State
from lamella.nn.flops import Flops
from lamella.nn.initializers import zeros
from lamella.nn.linear import Column, Row
from lamella.nn.norm import RMSNorm
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard
from lamella_kernels.attention import packed_attention
from lamella_kernels.attention.eager import attend
from lamella_kernels.rotary import rotary

FIRST_VALUES = "attention_values"  # what `value_residual` carries


class Config(MixerConfig):
    mixer: Literal["attention"]
    num_heads: Positive
    num_kv_heads: Positive | None = None  # None: as many as heads
    head_dim: Positive | None = None  # None: d_model / num_heads
    rope_theta: Annotated[float, Field(gt=0)] | None = None  # None: no positions (Jamba)
    rope_dim: Positive | None = None  # channels of a head that are turned, its first; None: all
    window: Positive | None = None  # tokens a query sees, itself included; None: the whole document
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    value_residual: bool = False  # values are the mean of the layer's own and the first such layer's

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """H, G, K. Raises UserError where they do not divide."""
        heads, groups = self.num_heads, self.num_kv_heads or self.num_heads
        if heads % groups:
            raise UserError(f"attention: num_heads={heads} is not a multiple of num_kv_heads={groups}")
        if self.head_dim is None and d_model % heads:
            raise UserError(f"attention: d_model={d_model} does not divide by num_heads={heads}; set head_dim")
        size = self.head_dim or d_model // heads
        if self.rope_theta is not None and size % 2:
            raise UserError(f"attention: rotary positions need an even head_dim, got {size}")
        if self.rope_dim is not None and (self.rope_dim % 2 or self.rope_dim > size):
            raise UserError(f"attention: rope_dim={self.rope_dim} must be even and at most head_dim={size}")
        return heads, groups, size

    def build(self, d_model: int, norm_eps: float, shard: Shard) -> "Attention":
        return Attention(self, d_model, norm_eps, shard)

    def carries(self, d_model: int) -> dict[str, int]:
        _, groups, size = self.sizes(d_model)
        return {FIRST_VALUES: groups * size} if self.value_residual else {}

    def flops(self, d_model: int, length: int) -> Flops:
        heads, groups, size = self.sizes(d_model)
        span = min(self.window or length, length)
        pairs = span * (span + 1) / 2 + (length - span) * span
        return Flops(
            matmul=2 * length * d_model * size * (2 * heads + 2 * groups),
            scores=4 * pairs * heads * size,
        )

    def shrink(self, tensor: int) -> "Config":
        grouped = self.num_kv_heads is not None and self.num_kv_heads < self.num_heads
        window = None if self.window is None else min(self.window, 5)
        turned = None if self.rope_dim is None else 4
        return change(
            self,
            num_heads=tensor * (2 if grouped else 1),
            num_kv_heads=tensor,
            head_dim=8,
            window=window,
            rope_dim=turned,
        )


class Attention(Mixer):
    def __init__(self, config: Config, d_model: int, norm_eps: float, shard: Shard):
        super().__init__()
        heads, groups, size = config.sizes(d_model)
        for name, count in (("num_heads", heads), ("num_kv_heads", groups)):
            if count % shard.size:
                raise UserError(f"attention: {name}={count} cannot be split over tensor={shard.size}; choose a divisor")
        self.config, self.head_dim = config, size
        bias = zeros if config.qkv_bias else None
        self.qkv = Column(shard, d_model, (heads * size, groups * size, groups * size), bias=bias)
        self.q_norm = RMSNorm(shard, size, norm_eps, "branch") if config.qk_norm else None
        self.k_norm = RMSNorm(shard, size, norm_eps, "branch") if config.qk_norm else None
        self.out = Row(shard, heads * size, d_model, bias=config.out_bias)

    def forward(self, x_BTD: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        q, k, v = self.qkv(x_BTD)
        if self.config.value_residual:
            v = (v + rows.carried.setdefault(FIRST_VALUES, v)) / 2
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope_theta is not None:
            theta, width = self.config.rope_theta, self.config.rope_dim
            q, k = (rotary(t, rows.position_BT, theta=theta, width=width) for t in (q, k))
        if state is None:
            y = rows.core(_packed, q, k, v, rows, self.config.window)
        else:
            y = _continued(q, k, v, rows, self.config.window, state)
        return self.out(y.flatten(2))


def _packed(q: Tensor, k: Tensor, v: Tensor, rows: Rows, window: int | None) -> Tensor:
    """[B, T, H or G, K] -> [B, T, H, K], document by document."""
    q_NHK, k_NGK, v_NGK = (t.flatten(0, 1) for t in (q, k, v))
    return packed_attention(q_NHK, k_NGK, v_NGK, rows.lengths, window=window, starts=rows.starts).view_as(q)


def _continued(q: Tensor, k: Tensor, v: Tensor, rows: Rows, window: int | None, state: State) -> Tensor:
    """The same, where each row's first tokens continue the document of the last call.

    The state keeps the keys and values of each row's last document, `k` and `v` [B, G, S, K], and how many tokens it
    has had, `count` [B]: token n is in slot n; with a window in slot n % window, where the token it replaces has left
    every query's sight.
    """
    batch, time = rows.position_BT.shape
    had_B = state["count"] if state else torch.zeros(batch, dtype=torch.long, device=q.device)
    had_B = torch.where(rows.reset_BT[:, 0], 0, had_B)
    most = int(had_B.max()) + time
    room = most if window is None else min(most, window)
    for name in ("k", "v"):
        state[name] = _with_room(state.get(name), k, room, window)
    if time == 1:
        state["count"] = had_B + 1
        return _step(q[:, 0], k[:, 0], v[:, 0], had_B, room, window, state).unsqueeze(1)
    out, counts = [], []
    for b, had in enumerate(had_B.tolist()):
        starts = [t for t in rows.reset_BT[b].nonzero().flatten().tolist() if t]
        slot_L = _slots(had, had, window, q.device)
        past = [state[name][b][:, slot_L].transpose(0, 1) for name in ("k", "v")]
        for start, stop in itertools.pairwise([0, *starts, time]):
            now = [torch.cat([old, new[b, start:stop]]) for old, new in zip(past, (k, v), strict=True)]
            out.append(attend(q[b, start:stop], *now, window=window))
            past = [t[:0] for t in past]
        counts.append(time - starts[-1] if starts else had + time)
        slot_L = _slots(counts[-1], len(now[0]), window, q.device)
        for name, t_LGK in zip(("k", "v"), now, strict=True):
            state[name][b][:, slot_L] = t_LGK[len(t_LGK) - len(slot_L) :].transpose(0, 1)
    state["count"] = torch.tensor(counts, device=q.device)
    return torch.cat(out).view_as(q)


def _with_room(kept: Tensor | None, like_BTGK: Tensor, room: int, window: int | None) -> Tensor:
    """[B, G, S >= room, K]: what is kept, followed by zeros. S doubles, so that a token's share of the copies is O(1);
    it ends at the window.
    """
    have = 0 if kept is None else kept.shape[2]
    if kept is not None and room <= have:
        return kept
    size = max(room, 2 * have, 64)
    batch, _, groups, width = like_BTGK.shape
    grown = like_BTGK.new_zeros(batch, groups, size if window is None else min(size, window), width)
    if kept is not None:
        grown[:, :, :have] = kept
    return grown


def _slots(count: int, last: int, window: int | None, device: torch.device) -> Tensor:
    """Where the `last` tokens of a document of `count` tokens lie, those that the window has left."""
    if window is None:
        return torch.arange(count - last, count, device=device)
    return torch.arange(count - min(last, window), count, device=device) % window


def _step(
    q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor, had_B: Tensor, filled: int, window: int | None, state: State
) -> Tensor:
    """One token a row, all rows at once: the slots that a shorter row has not filled are masked. [B, H, K].

    The heads of a group are the queries of one attention, so that no key is repeated.
    """
    row_B, slot_B = torch.arange(len(had_B), device=had_B.device), had_B if window is None else had_B % window
    state["k"][row_B, :, slot_B], state["v"][row_B, :, slot_B] = k_BGK, v_BGK
    keys, values = state["k"][:, :, :filled], state["v"][:, :, :filled]
    mask = None
    if len(had_B) > 1:
        mask = (torch.arange(filled, device=had_B.device) <= had_B[:, None])[:, None, None]
    y = F.scaled_dot_product_attention(q_BHK.unflatten(1, (k_BGK.shape[1], -1)), keys, values, attn_mask=mask)
    return y.flatten(1, 2)
