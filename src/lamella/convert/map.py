"""One table a family, read in both directions: which block of which tensor of ours is which tensor of theirs.

A row is `our name -> their name`. Several names: theirs are the segments of our fused tensor, in order, or equal parts
of one without segments. `{expert}` in a name: theirs are the items of our stacked tensor; `[layer]`: ours is one item
of theirs. `kernel`, `turned` and `lone` say that a block has another shape there, `share` that it is a part of their
tensor, `grouped` that heads follow each other in another order. Placeholders in our name (`{layer}` a number, `{rest}`
anything) go into theirs; the first row that matches counts.

Expanded, a table is a list of links. Every element of ours lies in one link, and every tensor of theirs is one, or all
of its shares are: so whatever goes over comes back, and a tensor without a link is found by name.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lamella.config import ModelConfig
from lamella.errors import UserError
from lamella.model.lm import LanguageModel
from lamella.nn.shard import Place, placed_parameters

Form = Literal["same", "kernel", "turned", "item", "row", "lone", "grouped"]
Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Theirs:
    name: str
    form: Form = "same"
    at: int = 0
    of: int = 1
    dim: int = 0


Row = str | Theirs | tuple[str | Theirs, ...]
Table = Mapping[str, Row]


def kernel(name: str) -> Theirs:
    """A depthwise kernel, ours [I, K], theirs [I, 1, K]."""
    return Theirs(name, "kernel")


def turned(name: str) -> Theirs:
    """A matrix that is ours transposed, or a stack of them."""
    return Theirs(name, "turned")


def lone(name: str) -> Theirs:
    """A vector, theirs [1, 1, D]."""
    return Theirs(name, "lone")


def share(name: str, at: int, of: int, dim: int = 0, form: Form = "same") -> Theirs:
    """The part `at` of `of` equal ones of their tensor along `dim`; `row`: a vector that is a row of theirs."""
    return Theirs(name, form, at, of, dim)


def grouped(name: str) -> Theirs:
    """Queries, keys and values: ours all of each, theirs a group's queries, its key, its value, then the next group."""
    return Theirs(name, "grouped")


@dataclasses.dataclass(frozen=True)
class Link:
    """The block `size` at `offset` of our tensor is, in the given form, their tensor: all of it, or the part `at` of
    `of` along `dim`. With `stack` theirs is a stack of `stack[1]` such, this the one at `stack[0]`.
    """

    ours: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    theirs: str
    form: Form
    at: int = 0
    of: int = 1
    dim: int = 0
    stack: tuple[int, int] | None = None

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Of the whole."""
        if self.stack is not None:
            return (self.stack[1], *self.alone.their_shape)
        shape = self._block_shape
        return (*shape[: self.dim], shape[self.dim] * self.of, *shape[self.dim + 1 :]) if shape else ()

    @property
    def alone(self) -> "Link":
        """Without the stack."""
        return dataclasses.replace(self, stack=None)

    @property
    def _block_shape(self) -> tuple[int, ...]:
        return tuple(self.to_theirs(torch.empty(self.size, device="meta")).shape)

    def to_theirs(self, block: Tensor) -> Tensor:
        """Our block, or a part of it, as theirs is."""
        if self.stack is not None:
            return self.alone.to_theirs(block)[None]
        if self.form == "kernel":
            return block.unsqueeze(1)
        if self.form == "turned":
            return block.mT
        if self.form in ("row", "lone"):
            return block[None] if self.form == "row" else block[None, None]
        return block.squeeze(0) if self.form == "item" else block

    def to_ours(self, tensor: Tensor) -> Tensor:
        """The way back."""
        if self.stack is not None:
            return self.alone.to_ours(tensor[0])
        if self.form == "kernel":
            return tensor.squeeze(1)
        if self.form == "turned":
            return tensor.mT
        if self.form in ("row", "lone"):
            return tensor[0] if self.form == "row" else tensor[0, 0]
        return tensor.unsqueeze(0) if self.form == "item" else tensor

    def their_slices(self, box: Slices | None = None) -> Slices:
        """Where our block, or a box of it, lies in theirs."""
        if self.stack is not None:
            return (slice(self.stack[0], self.stack[0] + 1), *self.alone.their_slices(box))
        found = self._in_block(tuple(slice(0, n) for n in self.size) if box is None else box)
        if self.of == 1:
            return found
        base, cut = self.at * self._block_shape[self.dim], found[self.dim]
        return (*found[: self.dim], slice(base + cut.start, base + cut.stop), *found[self.dim + 1 :])

    def _in_block(self, box: Slices) -> Slices:
        if self.form == "kernel":
            return (box[0], slice(0, 1), box[1])
        if self.form == "turned":
            return (*box[:-2], box[-1], box[-2])
        if self.form in ("row", "lone"):
            return (*[slice(0, 1)] * (1 if self.form == "row" else 2), *box)
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


def links(
    found: dict[str, Place], table: Table, numbers: Sequence[Mapping[str, int | str]], family: str
) -> list[Link]:
    """The table for the parameters that there are. `numbers`: what placeholders of a layer stand for besides, and the
    `groups` of its heads.

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
            blocks = blocks if len(blocks) == len(row) else _parts(place.shape, len(row))
        for part, (offset, size) in zip(row, blocks, strict=True):
            part = Theirs(part) if isinstance(part, str) else part
            stack = (int(words["layer"]), len(numbers)) if "[layer]" in part.name else None
            template = part.name.replace("[layer]", "")
            if part.form == "grouped":
                for at, head, one, of in _heads(place, int(words["groups"])):
                    linked.append(Link(name, head, one, template.format_map(words), "same", at, of, 0, stack))
                continue
            if "{expert}" not in template:
                their_name = template.format_map(words)
                linked.append(Link(name, offset, size, their_name, part.form, part.at, part.of, part.dim, stack))
                continue
            for item in range(size[0]):
                at, one = (offset[0] + item, *offset[1:]), (1, *size[1:])
                their_name = template.format_map(words | {"expert": str(item)})
                linked.append(Link(name, at, one, their_name, "item", stack=stack))
    shares = Counter((link.theirs, link.stack) for link in linked)
    taken = {(link.theirs, link.stack, link.at) for link in linked}
    assert len(taken) == len(linked), f"{family}: two blocks of ours are one"
    whole = all(shares[link.theirs, link.stack] == link.of for link in linked)
    assert whole, f"{family}: a part of theirs is no block of ours"
    return linked


def _heads(place: Place, groups: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...], int]]:
    """Of a fused projection of queries, keys and values: each head's place there, its offset and size, and how many."""
    query, key, value = place.boxes
    size = key.size[0] // groups
    queries = query.size[0] // size
    of, each = queries + 2 * groups, queries // groups
    found = []
    for box, count in ((query, queries), (key, groups), (value, groups)):
        for head in range(count):
            group, inside = divmod(head, each) if box is query else (head, each + (box is value))
            at = group * (each + 2) + inside
            found.append((at, (box.whole[0] + head * size, *box.whole[1:]), (size, *box.size[1:]), of))
    return found


def _parts(shape: tuple[int, ...], count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and size of equal parts along the first dim."""
    assert not shape[0] % count, (shape, count)
    size = shape[0] // count
    return [((at * size, *(0 for _ in shape[1:])), (size, *shape[1:])) for at in range(count)]


def _pattern(key: str) -> re.Pattern[str]:
    kinds = {"layer": r"\d+", "rest": r".+"}
    parts = re.split(r"\{(\w+)\}", key)
    return re.compile("".join(f"(?P<{p}>{kinds[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))
