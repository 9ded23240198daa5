"""Geometry: which boxes of a global tensor a flat piece of a rank's tensor is made of.

ZeRO keeps 1-d fragments of flattened parameters, a tensor group keeps boxes of whole ones. A range of a flattened
tensor is a union of at most 2*ndim - 1 boxes (a staircase at its start, a block, a staircase at its end), so a fragment
can be saved and loaded where it lies, without gathering, and by any other layout.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from lamella.nn.shard import Box

LIMIT_BYTES = 64 * 2**20  # a reader takes in a whole saved piece even for a corner of it


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements [start, stop) of the flattened tensor of `shape` as boxes (offset, size), in row-major order."""
    shape = tuple(shape)
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # the whole rows are [first, last)
    if first > last:  # inside one row
        return _in_row(shape, last, start - last * inner, stop - last * inner)
    head = _in_row(shape, first - 1, start - (first - 1) * inner, inner) if start < first * inner else []
    body = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if first < last else []
    return head + body + _in_row(shape, last, 0, stop - last * inner)


def pieces(
    fragment: Tensor, local_shape: Sequence[int], start: int, boxes: tuple[Box, ...], limit_bytes: int = LIMIT_BYTES
) -> list[tuple[tuple[int, ...], Tensor]]:
    """Views of the 1-d `fragment`, each with its offset in the global tensor.

    The fragment is the elements [start, start + n) of this rank's flattened tensor of `local_shape`, and `boxes` says
    where that tensor lies in the whole (`Place.boxes`). No view is larger than `limit_bytes`, or than one element.
    """
    limit = max(1, limit_bytes // fragment.element_size())
    found, at = [], 0
    for offset, size in flat_boxes(local_shape, start, start + fragment.numel()):
        block = fragment.narrow(0, at, math.prod(size)).view(size)
        at += block.numel()
        for box in boxes:
            low = [max(a, b) for a, b in zip(offset, box.local, strict=True)]
            high = [min(a + m, b + n) for a, m, b, n in zip(offset, size, box.local, box.size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                view = block[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))]
                whole = tuple(w + a - b for w, a, b in zip(box.whole, low, box.local, strict=True))
                found += _cut(whole, view, limit)
    return found


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((row, *offset), (1, *size)) for offset, size in flat_boxes(shape[1:], start, stop)]


def _cut(offset: tuple[int, ...], view: Tensor, limit: int) -> list[tuple[tuple[int, ...], Tensor]]:
    """The view in parts of at most `limit` elements, cut along its first dim that is longer than 1, then the next."""
    if view.numel() <= limit:
        return [(offset, view)]
    dim = next(d for d, n in enumerate(view.shape) if n > 1)
    step = max(1, limit * view.shape[dim] // view.numel())
    found = []
    for at in range(0, view.shape[dim], step):
        part = view.narrow(dim, at, min(step, view.shape[dim] - at))
        found += _cut((*offset[:dim], offset[dim] + at, *offset[dim + 1 :]), part, limit)
    return found
