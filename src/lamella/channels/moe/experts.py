"""The experts: as many MLPs, their weights stacked [E, ...], each over the tokens that are its own.

With expert = 1 every rank of the tensor group holds a share of each expert's width, so no token is exchanged. Else the
experts are dealt whole to the ranks of the expert group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.channels.mlp import Activation, activate, hidden_segments
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard


class Experts(nn.Module):
    def __init__(self, num_experts: int, top_k: int, d_model: int, d_ff: int, activation: Activation, shard: Shard):
        super().__init__()
        self.activation: Activation = activation
        segments, active = hidden_segments(activation, d_ff), top_k / num_experts
        self.parts = len(segments)
        shape_in, shape_out = (num_experts, sum(segments), d_model), (num_experts, d_model, d_ff)
        dealt = shard.exchange.size > 1
        in_dim, out_dim, over = (0, 0, "expert") if dealt else (1, 2, "tensor")
        fused = None if dealt else segments
        self.w_in = shard.parameter(
            shape_in, shard.normal, split=in_dim, segments=fused, decay=True, active=active, over=over
        )
        self.w_out = shard.parameter(
            shape_out, shard.residual_normal, split=out_dim, decay=True, active=active, over=over
        )

    def forward(self, x_ND: Tensor, counts: list[int], rows: Rows) -> Tensor:
        """x sorted by this rank's experts, `counts` rows for each; returns the same rows.

        With their widths split over the tensor group the result is partial there.
        """
        w_in, w_out = self.w_in.to(x_ND.dtype).unbind(0), self.w_out.to(x_ND.dtype).unbind(0)
        pieces = [
            F.linear(rows.core(activate, self.activation, *F.linear(x, a).chunk(self.parts, dim=-1)), b)
            for x, a, b in zip(x_ND.split(counts), w_in, w_out, strict=True)
        ]
        return torch.cat(pieces)
