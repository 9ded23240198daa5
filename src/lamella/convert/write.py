"""Safetensors, written as they come: sizes are known before, so a file's head is written first and nothing is held.

The format: 8 bytes of the head's length, the head (JSON: name -> dtype, shape, offsets), the tensors' bytes in a row.
The library's own writer wants all tensors of a file at once.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamella.convert.read import BINARY, FLOATS, SAFE

SHARD_BYTES = 5 * 10**9


class Kind(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Kinds = dict[str, Kind]


def write_weights(
    folder: Path, kinds: Kinds, tensors: Iterator[tuple[str, Tensor]], limit: int = SHARD_BYTES
) -> list[Path]:
    """Writes `tensors`, which come in the order of `kinds`, into files of at most `limit` bytes (or of one tensor).

    Wider types come first, so that each lies where its size divides. More than one file: with
    `model.safetensors.index.json`. Returns the files. Raises OSError.
    """
    shards = _deal(kinds, limit)
    count = len(shards)
    names = [SAFE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, {n: kinds[n] for n in shard}, tensors)
    if count > 1:
        where = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        sizes = {
            "total_parameters": sum(math.prod(kind.shape) for kind in kinds.values()),
            "total_size": sum(kind.bytes for kind in kinds.values()),
        }
        write_json(folder / f"{SAFE}.index.json", {"metadata": sizes, "weight_map": where})
    return [folder / name for name in names]


def write_file(path: Path, kinds: Kinds, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Writes the next of `tensors`, those of `kinds`, into one file. Raises OSError."""
    with path.open("xb") as file:
        file.write(_head(kinds))
        for wanted, kind in kinds.items():
            found, tensor = next(tensors)
            assert (found, tuple(tensor.shape), tensor.dtype) == (wanted, *kind), (found, wanted)
            file.write(_bytes(tensor))


def write_binary(
    folder: Path, kinds: Kinds, tensors: Iterator[tuple[str, Tensor]], twins: dict[str, str]
) -> None:
    """Writes `pytorch_model.bin` by `torch.save`, from a file that is mapped, not read. `twins`: further names of some.

    All tensors are of one dtype. Raises OSError.
    """
    (dtype,) = {kind.dtype for kind in kinds.values()}
    sizes = [math.prod(kind.shape) for kind in kinds.values()]
    plain = folder / "weights.plain"
    with plain.open("xb") as file:
        for _, tensor in tensors:
            file.write(_bytes(tensor))
    flat = torch.from_file(str(plain), shared=False, size=sum(sizes), dtype=dtype)
    parts = flat.split(sizes)
    named = {name: part.view(kind.shape) for (name, kind), part in zip(kinds.items(), parts, strict=True)}
    with (folder / BINARY).open("xb") as file:
        torch.save(named | {twin: named[name] for twin, name in twins.items()}, file)
    del flat, parts, named
    plain.unlink()


def write_json(file: Path, tree: Any) -> None:
    file.write_text(json.dumps(tree, indent=2) + "\n")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _deal(kinds: Kinds, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, kind in kinds.items():
        if shards[-1] and filled + kind.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += kind.bytes
    return shards


def _head(kinds: Kinds) -> bytes:
    words = {dtype: word for word, dtype in FLOATS.items()}
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for name, kind in kinds.items():
        offsets = [at, at + kind.bytes]
        head[name] = {"dtype": words[kind.dtype], "shape": list(kind.shape), "data_offsets": offsets}
        at += kind.bytes
    raw = json.dumps(head, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
