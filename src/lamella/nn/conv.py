"""Depthwise causal convolution over time, the short one of Mamba and its kin."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.nn.initializers import uniform
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide
from lamella_kernels.causal_conv1d import causal_conv1d


class CausalConv1d(nn.Module):
    """silu(conv(x) + b) over the documents of the rows; channels split over the ranks. Weight [I, K], last tap now.

    Several `channels` are the segments of a fused x: a rank has its share of each.
    """

    def __init__(self, shard: Shard, channels: Sequence[int] | int, width: int):
        super().__init__()
        segments = (channels,) if isinstance(channels, int) else tuple(channels)
        init = uniform(width**-0.5)  # torch.nn.Conv1d's
        self.weight = shard.parameter((sum(segments), width), init, split=0, segments=segments, decay=True)
        self.bias = shard.parameter((sum(segments),), init, split=0, segments=segments)

    def forward(self, x_BTI: Tensor, rows: Rows, state: dict[str, Tensor] | None = None) -> Tensor:
        past = None if state is None else state.get("conv")
        if state is not None and past is not None and x_BTI.shape[1] == 1:
            return self._step(x_BTI, rows, past, state)
        y_BTI, last = causal_conv1d(
            x_BTI,
            self.weight,
            self.bias,
            activation="silu",
            position_BT=rows.position_BT,
            initial_state_BKI=past,
            return_state=True,
        )
        if state is not None:
            state["conv"] = last
        return y_BTI

    def _step(self, x_B1I: Tensor, rows: Rows, past: Tensor, state: dict[str, Tensor]) -> Tensor:
        """One token a row: the same sum without the calls that make long rows fast."""
        seen_BKI = torch.cat([past, x_B1I], 1)
        state["conv"] = seen_BKI[:, 1:]
        back_K = torch.arange(seen_BKI.shape[1] - 1, -1, -1, device=past.device)
        inside_BK1 = (back_K <= rows.position_BT).unsqueeze(-1)  # of the document
        taps_BKI = wide(seen_BKI) * inside_BK1 * wide(self.weight.t())
        return F.silu(taps_BKI.sum(1, keepdim=True) + wide(self.bias)).to(x_B1I.dtype)
