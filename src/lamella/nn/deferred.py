"""Linears whose weight gradient waits: backward gives the input's gradient at once, the weight's when it is asked for.

A zero-bubble pipeline fills its idle time with the waiting ones (Qi et al. 2023, arXiv 2401.10241).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightGradients:
    """What backward has left undone, in its order."""

    def __init__(self) -> None:
        self.waiting: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def linear(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        """`F.linear` in x's dtype; the weight's gradient joins the queue, the bias's comes by autograd."""
        y: Tensor = _Linear.apply(x, weight, self)  # type: ignore[assignment]
        return y if bias is None else y + bias.to(y.dtype)

    def take(self) -> Callable[[], None]:
        """Empties the queue; calling what is returned adds its gradients to the parameters."""
        items, self.waiting = self.waiting, []
        return lambda: _add(items)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.queue = weight, queue
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight = ctx.saved_tensors
        ctx.queue.waiting.append((ctx.weight, x, grads[0]))
        return grads[0] @ weight.to(x.dtype), None, None


@torch.no_grad()
def _add(items: list[tuple[nn.Parameter, Tensor, Tensor]]) -> None:
    for weight, x, grad in items:
        dw = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)
        weight.grad = dw if weight.grad is None else weight.grad.add_(dw)
