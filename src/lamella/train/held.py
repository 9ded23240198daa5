"""Tensors by name as a process of `verify` reports them: the blocks it has, where they lie, how far two are apart."""

import math

import torch
from torch import Tensor

Held = dict[str, list[tuple[tuple[int, ...], Tensor]]]  # by name, what a process has of it: offset in the whole, block
Named = dict[str, Tensor]


def whole(held: Held) -> Named:
    """The tensors of a process that holds all of them."""
    found = {}
    for name, blocks in held.items():
        if len(blocks) == 1:
            found[name] = blocks[0][1]
            continue
        dims = range(blocks[0][1].dim())
        shape = [max(offset[d] + block.shape[d] for offset, block in blocks) for d in dims]
        found[name] = torch.full(shape, math.nan, dtype=blocks[0][1].dtype)
        for offset, block in blocks:
            found[name][slices(offset, block)] = block
    return found


def slices(offset: tuple[int, ...], block: Tensor) -> tuple[slice, ...]:
    """Where a block lies in its whole."""
    return tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))


def relative(error: Tensor, of: Tensor) -> float:
    """|error| / |of|; infinite where only `of` is zero."""
    size, off = (float(t.double().norm()) for t in (of, error))
    return off / size if size else (0.0 if off == 0 else math.inf)


def norm(tensors: Named) -> float:
    """Of all of them together."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
