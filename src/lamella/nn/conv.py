"""Depthwise causal convolution over time, the short one of Mamba and its kin."""

from torch import Tensor, nn

from lamella.nn.initializers import uniform
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard
from lamella_kernels.causal_conv1d import causal_conv1d


class CausalConv1d(nn.Module):
    """silu(conv(x) + b) over the documents of the rows; channels split over the ranks. Weight [I, K], last tap now."""

    def __init__(self, shard: Shard, channels: int, width: int):
        super().__init__()
        init = uniform(width**-0.5)  # torch.nn.Conv1d's
        self.weight = shard.parameter((channels, width), init, split=0, decay=True)
        self.bias = shard.parameter((channels,), init, split=0)

    def forward(self, x_BTI: Tensor, rows: Rows, state: dict[str, Tensor] | None = None) -> Tensor:
        past = None if state is None else state.get("conv")
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
