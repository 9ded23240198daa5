"""Triton launches as torch operators: "lamella::NAME" and "lamella::NAME_backward", which torch.compile, fake and meta
tensors and `torch.library.opcheck` know.

    forward(x, weight, eps) -> (y, rstd)        backward(dy, x, weight, rstd, needs_weight) -> (dx, dweight)
    rmsnorm = register("rmsnorm", forward, backward, outputs=("y", "rstd"), gradients=("x", "weight"), hidden=("rstd",))
    y, _ = rmsnorm(x, weight, eps)

A backward's parameters say by their names what they get: an argument of forward, one of its outputs, "dNAME" an
output's gradient (None where nobody asked for one), "needs_NAME" whether an argument's gradient is asked for. Only
what is named is kept. Both functions allocate with torch.empty and call `launch`, which does nothing for tensors
without memory: the same code is the operator and its fake.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Listener = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_listeners: list[Listener] = []


def is_fake(tensor: Tensor) -> bool:
    """Whether it is one of torch.compile's, whose sizes may be symbols: no loop over them."""
    return isinstance(tensor, FakeTensor)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options) on the device of the first argument, a tensor."""
    first = arguments[0]
    if is_fake(first):
        return
    if first.is_meta:
        for listener in _listeners:
            listener(kernel, grid, arguments, options)
        return
    if 0 in grid:
        return
    if first.is_cuda:
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def cdiv(count: int, size: int) -> int:
    """How many blocks of this size hold so many."""
    return -(-count // size)


def power_of_2(width: int) -> int:
    """The smallest that is no less, as block sizes are."""
    return 1 << (int(width) - 1).bit_length()


def rows_of(tensor: Tensor) -> Tensor:
    """[N, D], as a view where its memory allows; channels follow one another, rows may be apart."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def absent(result: Tensor | None, like: Tensor) -> Tensor:
    """The result, or nothing in its place: an operator returns the same number of tensors always."""
    return torch.empty(0, device=like.device) if result is None else result


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """The listener hears of every launch on meta tensors."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    outputs: Sequence[str],
    gradients: Sequence[str | Sequence[str]],
    hidden: Sequence[str] = (),
) -> Callable[..., Any]:
    """The operator, differentiable once.

    outputs: names of what forward returns; `hidden` ones are for backward alone. gradients: the arguments whose
    gradients backward returns, in order; several in a tuple share one, others have none. Where an argument is None or
    its gradient is not asked for, what backward returns in its place is dropped.
    """
    op = torch.library.custom_op(f"lamella::{name}", forward, mutates_args=())
    op_backward = torch.library.custom_op(f"lamella::{name}_backward", backward, mutates_args=())
    op.register_fake(forward)
    op_backward.register_fake(backward)
    arguments = list(inspect.signature(forward).parameters)
    wanted = list(inspect.signature(backward).parameters)
    of_gradient = {f"d{output}": index for index, output in enumerate(outputs)}
    of_need = {f"needs_{argument}": index for index, argument in enumerate(arguments)}
    kept = [word for word in wanted if word not in of_gradient and word not in of_need]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        named = dict(zip(outputs, results, strict=True)) | dict(zip(arguments, inputs, strict=True))
        values = {word: named[word] for word in kept}
        ctx.tensors = [word for word, value in values.items() if isinstance(value, Tensor)]
        ctx.others = {word: value for word, value in values.items() if word not in ctx.tensors}
        ctx.save_for_backward(*(values[word] for word in ctx.tensors))
        ctx.mark_non_differentiable(*(named[word] for word in hidden))
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        values = ctx.others | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        values |= {word: of_outputs[index] for word, index in of_gradient.items()}
        values |= {word: ctx.needs_input_grad[index] for word, index in of_need.items()}
        found = op_backward(*(values[word] for word in wanted))
        named: dict[str, Tensor | None] = {}
        for words, gradient in zip(gradients, found if isinstance(found, tuple) else (found,), strict=True):
            named.update(dict.fromkeys((words,) if isinstance(words, str) else words, gradient))
        needed = zip(arguments, ctx.needs_input_grad, strict=True)
        return tuple(named.get(argument) if needs else None for argument, needs in needed)

    op.register_autograd(differentiate, setup_context=setup)
    return op
