"""How far two checkpoints are apart, tensor by tensor, whatever layouts saved them; one piece of each is held."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from lamella.checkpoint.source import Source

MISSING = "nothing"


@dataclasses.dataclass(frozen=True)
class Apart:
    """`relative`: |B - A| / |A| of a tensor, `largest`: of an element. `same`: bit for bit."""

    name: str
    relative: float
    largest: float
    same: bool


def tensors(a: Source, b: Source) -> Iterator[Apart]:
    """Those that both have in one shape and dtype, by name."""
    for name, kind in a.kinds.items():
        if b.kinds.get(name) != kind:
            continue
        square = of = largest = 0.0
        same = True
        for offset, size in a.boxes(name):
            one, two = a.read(name, offset, size), b.read(name, offset, size)
            # NaN is equal to itself here: what counts is whether the bits are.
            same = same and torch.equal(_bits(one), _bits(two))
            off = two.double() - one.double()
            square, of = square + float(off.square().sum()), of + float(one.double().square().sum())
            largest = max(largest, float(off.abs().max())) if off.numel() else largest
        apart = math.sqrt(square / of) if of else (0.0 if square == 0 else math.inf)
        yield Apart(name, 0.0 if same else apart, 0.0 if same else largest, same)


def unlike(a: Source, b: Source) -> list[str]:
    """One line for each tensor that one has and the other has not, or has in another shape or dtype."""
    found = []
    for name in sorted(a.kinds.keys() | b.kinds.keys()):
        one, two = a.kinds.get(name), b.kinds.get(name)
        if one != two:
            found.append(f"{name}: {one or MISSING} -> {two or MISSING}")
    return found


def values(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """One line for each plain value that differs, as `config.train.steps: 500 -> 1000`."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from values(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield f"{path}: {_short(a)} -> {_short(b)}"


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
