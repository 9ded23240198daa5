"""One checkpoint, read box by box without a model: to look at it, to compare it, to make another one of it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from lamella.checkpoint import store
from lamella.checkpoint.files import Reader, read_piece
from lamella.checkpoint.planner import Pieces

Offset = tuple[int, ...]


class Kind(NamedTuple):
    """What a tensor is as a whole."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Source:
    """`kinds` by name. Raises UserError where a file is damaged."""

    def __init__(self, path: Path):
        store.verify(path)
        metadata = Reader(path).metadata
        self.path, self.places = path, metadata.storage_data
        self.saved: dict[str, Any] = dict(sorted(metadata.state_dict_metadata.items()))  # DCP's of each tensor
        self.kinds = {name: Kind(saved.size, saved.properties.dtype) for name, saved in self.saved.items()}
        self._last: tuple[MetadataIndex, Tensor] | None = None

    def boxes(self, name: str) -> list[tuple[Offset, Offset]]:
        """Offset and size of each piece as it was saved."""
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self.saved[name].chunks]

    def read(self, name: str, offset: Offset, size: Offset) -> Tensor:
        """A box of a tensor, of whatever pieces it lies in."""
        found = torch.empty(size, dtype=self.kinds[name].dtype)
        for chunk in self.saved[name].chunks:
            low = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, chunk.offsets, chunk.sizes, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
                there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
                found[here] = self._piece(MetadataIndex(name, chunk.offsets))[there]
        return found

    def _piece(self, index: MetadataIndex) -> Tensor:
        if self._last is None or self._last[0] != index:
            place = self.places[index]
            self._last = index, read_piece(self.path / place.relative_path, place)
        return self._last[1]


class Produced(Pieces):
    """Pieces in boxes (offset, size), whose values are made when they are written, one at a time."""

    def __init__(self, kind: Kind, boxes: list[tuple[Offset, Offset]], produce: Callable[[Offset, Offset], Tensor]):
        super().__init__(kind.shape, kind.dtype, [])
        self._sizes, self._produce = {torch.Size(offset): torch.Size(size) for offset, size in boxes}, produce

    def at(self, offset: torch.Size | None) -> Tensor:
        assert offset is not None
        return self._produce(tuple(offset), tuple(self._sizes[offset]))

    def chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, size) for offset, size in self._sizes.items()]
