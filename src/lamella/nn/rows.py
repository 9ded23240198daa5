"""What a part of the model may know about the rows it is given, besides their activations."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lamella.nn.draw import Draw
from lamella.nn.record import Record
from lamella_kernels.attention import starts_of

Recompute = Literal["none", "selective", "full"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some packed rows. `document_BT`: index of the document inside the row, -1 on padding; `position_BT`: index
    inside it.

    A position of 0 starts a document anew; a row whose first position is above 0 continues the document of the state
    it is given. `draw` is None outside training (no jitter, no dropout). `loss_scale` is what one row's auxiliary loss
    weighs in the loss that is differentiated. `record` adds up sums for the step's metrics, `source_BT` tells by which
    of the data's sources the loss is told apart there (-1 on padding). `carried` holds what layers
    hand on beside the stream, by name; a mixer's `carries` declares it. `recompute` is what backward computes anew:
    "selective" what parts do between their projections, "full" whole layers.
    """

    document_BT: Tensor
    position_BT: Tensor
    draw: Draw | None = None
    loss_scale: float = 0.0
    record: Record | None = None
    source_BT: Tensor | None = None
    carried: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    recompute: Recompute = "none"

    def core(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`: what a part does between its projections, without parameters that only a module holds."""
        return self.again(function, *args) if self.recompute == "selective" else function(*args)

    def again(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, of which only the inputs are kept: backward runs it once more."""
        if not torch.is_grad_enabled():
            return function(*args)

        def contexts():
            return nullcontext(), nullcontext() if self.record is None else self.record.pause()

        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    @cached_property
    def reset_BT(self) -> Tensor:
        """Where a document starts: no state from before reaches this token."""
        return self.position_BT == 0

    @cached_property
    def real_BT(self) -> Tensor:
        """The tokens that are not padding."""
        return self.document_BT >= 0

    @cached_property
    def time_T(self) -> Tensor:
        return torch.arange(self.position_BT.shape[1], device=self.position_BT.device)

    @cached_property
    def where_BT(self) -> Tensor:
        """What names each token for random draws, int64; 0 where nothing is drawn."""
        if self.draw is None:
            return torch.zeros_like(self.position_BT, dtype=torch.long)
        return self.draw.where(self.time_T)

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths of the documents (padding is one, too) over the rows laid end to end; they sum to B * T."""
        start = self.reset_BT.clone()
        start[:, 0] = True
        at = start.flatten().nonzero().flatten().tolist()
        return [b - a for a, b in zip(at, [*at[1:], start.numel()], strict=True)]

    @cached_property
    def starts(self) -> Tensor:
        """Where they begin, and the last one's end: int32."""
        return starts_of(self.lengths, self.position_BT.device)


def one_document(tokens_BT: Tensor, start: int = 0) -> Rows:
    """Rows that hold a single document each, of which these are the tokens from `start` on."""
    document = torch.zeros_like(tokens_BT, dtype=torch.int32)
    position = torch.arange(start, start + tokens_BT.shape[1], dtype=torch.int32, device=tokens_BT.device)
    return Rows(document, position.expand_as(document))
