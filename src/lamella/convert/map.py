"""One table a family, read in both directions: which block of which tensor of ours is which tensor of theirs.

A row is `our name -> their name`. Several names: theirs are the segments of our fused tensor, in order. `{expert}` in a
name: theirs are the items of our stacked tensor. `kernel` and `turned` say that a block has another shape there.
Placeholders in our name (`{layer}` a number, `{rest}` anything) go into theirs; the first row that matches counts.

Expanded, a table is a list of links. Every element of ours lies in one link, and every tensor of theirs is one: so
whatever goes over comes back, and a tensor without a link is found by name.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lamella.config import ModelConfig
from lamella.errors import UserError
from lamella.model.lm import LanguageModel
from lamella.nn.shard import Place, placed_parameters

Form = Literal["same", "kernel", "turned", "item"]
Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Theirs:
    name: str
    form: Form = "same"


Row = str | Theirs | tuple[str | Theirs, ...]
Table = Mapping[str, Row]


def kernel(name: str) -> Theirs:
    """A depthwise kernel, ours [I, K], theirs [I, 1, K]."""
    return Theirs(name, "kernel")


def turned(name: str) -> Theirs:
    """A matrix that is ours transposed."""
    return Theirs(name, "turned")


@dataclasses.dataclass(frozen=True)
class Link:
    """The block `size` at `offset` of our tensor is the whole of their tensor, in the given form."""

    ours: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    theirs: str
    form: Form

    @property
    def their_shape(self) -> tuple[int, ...]:
        return tuple(self.to_theirs(torch.empty(self.size, device="meta")).shape)

    def to_theirs(self, block: Tensor) -> Tensor:
        """Our block, or a part of it, as theirs is."""
        if self.form == "kernel":
            return block.unsqueeze(1)
        if self.form == "turned":
            return block.t()
        return block.squeeze(0) if self.form == "item" else block

    def to_ours(self, tensor: Tensor) -> Tensor:
        """The way back."""
        if self.form == "kernel":
            return tensor.squeeze(1)
        if self.form == "turned":
            return tensor.t()
        return tensor.unsqueeze(0) if self.form == "item" else tensor

    def their_slices(self, box: Slices) -> Slices:
        """Where a box of our block lies in theirs."""
        if self.form == "kernel":
            return (box[0], slice(0, 1), box[1])
        if self.form == "turned":
            return (box[1], box[0])
        return box[1:] if self.form == "item" else box


def overlap(link: Link, offset: Sequence[int], size: Sequence[int]) -> tuple[Slices, Slices] | None:
    """A box [offset, offset + size) of our tensor and the link's block: their common part, in the block and in the box.
    """
    low = [max(a, b) for a, b in zip(link.offset, offset, strict=True)]
    high = [min(a + m, b + n) for a, m, b, n in zip(link.offset, link.size, offset, size, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    inside = [tuple(slice(a - o, b - o) for a, b, o in zip(low, high, at, strict=True)) for at in (link.offset, offset)]
    return inside[0], inside[1]


def places(config: ModelConfig) -> dict[str, Place]:
    """Our parameters by name. Raises UserError where the configuration is wrong."""
    with torch.device("meta"):
        return {name: p.place for name, p in placed_parameters(LanguageModel(config))}


def links(found: dict[str, Place], table: Table, numbers: Sequence[Mapping[str, int]], family: str) -> list[Link]:
    """The table for the parameters that there are. `numbers`: what placeholders of a layer stand for besides.

    Raises UserError for a parameter without a row.
    """
    rows = [(_pattern(key), row if isinstance(row, tuple) else (row,)) for key, row in table.items()]
    linked: list[Link] = []
    for name, place in found.items():
        match, row = next(((m, row) for pattern, row in rows if (m := pattern.fullmatch(name))), (None, ()))
        if match is None:
            raise UserError(f"{name} has no place in {family}")
        words = {**match.groupdict()}
        if "layer" in words:
            words |= {key: str(number) for key, number in numbers[int(words["layer"])].items()}
        blocks = [((0,) * len(place.shape), place.shape)]
        if len(row) > 1:
            blocks = [(box.whole, box.size) for box in place.boxes]
        for part, (offset, size) in zip(row, blocks, strict=True):
            part = Theirs(part) if isinstance(part, str) else part
            if "{expert}" not in part.name:
                linked.append(Link(name, offset, size, part.name.format_map(words), part.form))
                continue
            for item in range(size[0]):
                at, one = (offset[0] + item, *offset[1:]), (1, *size[1:])
                linked.append(Link(name, at, one, part.name.format_map(words | {"expert": str(item)}), "item"))
    names = [link.theirs for link in linked]
    assert len(set(names)) == len(names), f"{family}: two blocks of ours are one tensor of theirs"
    return linked


def _pattern(key: str) -> re.Pattern[str]:
    kinds = {"layer": r"\d+", "rest": r".+"}
    parts = re.split(r"\{(\w+)\}", key)
    return re.compile("".join(f"(?P<{p}>{kinds[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))
