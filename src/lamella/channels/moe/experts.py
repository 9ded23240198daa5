"""The experts: as many MLPs, their weights stacked [E, ...], each over the tokens that are its own.

With expert = 1 every rank of the tensor group holds a share of each expert's width, so no token is exchanged. Else the
experts are dealt whole to the ranks of the expert group.
"""

import dataclasses

import torch
from torch import Tensor, nn

from lamella.channels.mlp import Activation, activate, hidden_segments
from lamella.nn.initializers import scaled
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard
from lamella_kernels.grouped_gemm import grouped_gemm


@dataclasses.dataclass(frozen=True)
class ExpertSizes:
    num_experts: int
    top_k: int
    d_model: int
    d_ff: int


class Experts(nn.Module):
    def __init__(
        self, sizes: ExpertSizes, activation: Activation, dropout: float, init_scale: float, shard: Shard, place: str
    ):
        super().__init__()
        self.activation: Activation = activation
        self.shard, self.dropout, self.place, self.d_ff = shard, dropout, place, sizes.d_ff
        segments, active = hidden_segments(activation, sizes.d_ff), sizes.top_k / sizes.num_experts
        dealt = shard.exchange.size > 1
        in_dim, out_dim, over = (0, 0, "expert") if dealt else (1, 2, "tensor")
        self.w_in = shard.parameter(
            (sizes.num_experts, sum(segments), sizes.d_model),
            scaled(shard.normal, init_scale**0.5),
            split=in_dim,
            segments=None if dealt else segments,
            decay=True,
            active=active,
            over=over,
        )
        self.w_out = shard.parameter(
            (sizes.num_experts, sizes.d_model, sizes.d_ff),
            scaled(shard.residual_normal, init_scale**0.5),
            split=out_dim,
            decay=True,
            active=active,
            over=over,
        )

    def forward(self, x_ND: Tensor, where_N: Tensor, counts_E: Tensor, rows: Rows) -> Tensor:
        """x sorted by this rank's experts, counts_E rows for each; returns the same rows. `where_N` names the tokens.

        Rows behind the last expert's give 0. With their widths split over the tensor group the result is partial there.
        """
        hidden = grouped_gemm(x_ND, self.w_in, counts_E)
        return grouped_gemm(rows.core(self._hidden, hidden, where_N, counts_E, rows), self.w_out, counts_E)

    def _hidden(self, h_NF: Tensor, where_N: Tensor, counts_E: Tensor, rows: Rows) -> Tensor:
        h_NF = activate(self.activation, h_NF)
        if not self.dropout or rows.draw is None:
            return h_NF
        first = self.shard.exchange.rank * len(self.w_in)  # the whole model's number of this rank's first expert
        offset = self.shard.rank * h_NF.shape[-1] if h_NF.shape[-1] < self.d_ff else 0
        channels = torch.arange(offset, offset + h_NF.shape[-1], device=h_NF.device)
        places = [f"{self.place}/expert{expert}" for expert in range(first, first + len(counts_E))]
        row = torch.arange(len(h_NF), device=h_NF.device)
        expert_N = torch.searchsorted(counts_E.cumsum(0), row, right=True).clamp(max=len(counts_E) - 1)
        drawn_NF = rows.draw.among(places, expert_N, where_N, channels)
        return h_NF * (drawn_NF >= self.dropout) / (1 - self.dropout)
