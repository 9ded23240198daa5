"""A folder of Megatron-LM's, format `torch_dist`, read by offsets: what is not asked for is not read.

    FOLDER/latest_checkpointed_iteration.txt     500, or release
           iter_0000500/  common.pt              the training arguments, and what every rank has the same
                          .metadata              which piece of which tensor lies where (DCP's)
                          metadata.json          the format
                          __0_0.distcp, ...      pieces, as torch.save writes them, one behind the other

`common.pt` and `.metadata` are pickles, read as data (`lamella.checkpoint.unpickle`).
"""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoint.saved import Saved, read_saved
from lamella.checkpoint.unpickle import Record, read_pickle
from lamella.convert.map import Slices
from lamella.convert.read import FLOATS
from lamella.errors import UserError

LATEST, COMMON, METADATA, FORMAT = "latest_checkpointed_iteration.txt", "common.pt", ".metadata", "metadata.json"
HOLE = "a hole, or two pieces at one place"
DAMAGED = "damaged or incomplete; copy the folder again"


@dataclasses.dataclass(frozen=True)
class Piece:
    """The block `size` at `offset` of a tensor: `length` bytes from `at` of a file."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    at: int
    length: int


@dataclasses.dataclass(frozen=True)
class Tensors:
    """One tensor; `dtype` is a text where it is no float."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    pieces: tuple[Piece, ...]


def is_megatron(folder: Path) -> bool:
    return (folder / LATEST).is_file() or ((folder / METADATA).is_file() and (folder / FORMAT).is_file())


class Folder:
    """`tensors` and `objects` by name, `common` as it says. Raises UserError: another format, damaged, no arguments."""

    def __init__(self, source: Path):
        self.folder = _iteration(source)
        try:
            said = json.loads((self.folder / FORMAT).read_bytes())
            backend = said["sharded_backend"] if isinstance(said, dict) else None
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.folder / FORMAT}: cannot be read ({error}); {DAMAGED}") from None
        if backend != "torch_dist":
            raise UserError(f"{self.folder / FORMAT}: format {backend}; save it as torch_dist (--ckpt-format)")
        self.tensors, self.objects = _metadata(self.folder / METADATA, self.folder)
        self.common = read_saved(self.folder / COMMON)
        args = self.common.get("args") if isinstance(self.common, dict) else None
        if not isinstance(args, Record) or not args.state:
            raise UserError(f"{self.folder / COMMON}: holds no args, the arguments of training that tell the model")
        self.args: dict[str, Any] = args.state
        self._known: dict[Piece, Saved] = {}

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor of floats."""
        dtype = self.tensors[name].dtype
        assert isinstance(dtype, torch.dtype), (name, dtype)
        return dtype

    def read(self, name: str, slices: Slices | None = None) -> Tensor:
        """The tensor, or a box of it, in its dtype. Raises UserError."""
        held = self.tensors[name]
        box = slices or tuple(slice(0, n) for n in held.shape)
        block = torch.empty([s.stop - s.start for s in box], dtype=self.dtype(name))
        parts: list[tuple[list[int], list[int]]] = []
        for piece in held.pieces:
            low = [max(s.start, o) for s, o in zip(box, piece.offset, strict=True)]
            high = [min(s.stop, o + n) for s, o, n in zip(box, piece.offset, piece.size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            parts.append((low, high))
            here, there = (
                tuple(slice(a - o, b - o) for a, b, o in zip(low, high, at, strict=True))
                for at in ([s.start for s in box], piece.offset)
            )
            saved = self._saved(piece)
            if saved.shape != piece.size or saved.dtype != block.dtype:
                raise UserError(f"{self.folder / piece.file}: {name} is of another shape or type there; {DAMAGED}")
            block[here] = saved.tensor()[there]
        if not _fill(parts, block.numel()):
            raise UserError(f"{self.folder / METADATA}: {name} has {HOLE}; {DAMAGED}")
        return block

    def _saved(self, piece: Piece) -> Saved:
        if piece not in self._known:
            file = self.folder / piece.file
            saved = read_saved(file, piece.at, piece.length)
            if not isinstance(saved, Saved):
                raise UserError(f"{file}: no tensor at byte {piece.at}; {DAMAGED}")
            self._known[piece] = saved
        return self._known[piece]


def _fill(parts: list[tuple[list[int], list[int]]], count: int) -> bool:
    """Do these boxes (low, high) make up `count` elements, none of them twice?"""
    sizes = [math.prod(b - a for a, b in zip(low, high, strict=True)) for low, high in parts]
    apart = all(
        any(b <= c or d <= a for a, b, c, d in zip(*one, *other, strict=True))
        for one, other in itertools.combinations(parts, 2)
    )
    return sum(sizes) == count and apart


def _iteration(source: Path) -> Path:
    latest = source / LATEST
    if not latest.is_file():
        return source
    text = latest.read_text(errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise UserError(f"{latest}: neither the number of an iteration nor release: {text[:40]!r}")
    folder = source / (text if text == "release" else f"iter_{int(text):07d}")
    if not (folder / FORMAT).is_file():
        raise UserError(f"{folder}: no {FORMAT}, so no distributed checkpoint; save it with --ckpt-format torch_dist")
    return folder


def _metadata(file: Path, folder: Path) -> tuple[dict[str, Tensors], set[str]]:
    try:
        whole = read_pickle(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    try:
        return _read(whole, file)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{file}: {DAMAGED} ({' '.join(str(error).split())[:80]})") from None


def _read(whole: Record, file: Path) -> tuple[dict[str, Tensors], set[str]]:
    stored: dict[tuple[str, tuple[int, ...]], Record] = {}
    for index, info in whole.state["storage_data"].items():
        stored[index.state["fqn"], index.state.get("offset") or ()] = info
    tensors: dict[str, Tensors] = {}
    objects: set[str] = set()
    for name, held in whole.state["state_dict_metadata"].items():
        if held.kind.endswith(".BytesStorageMetadata"):
            objects.add(name)
            continue
        shape, dtype = _sizes(held.state["size"]), held.state["properties"].args[0]
        pieces = []
        for chunk in held.state["chunks"]:
            offset, size = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
            info = stored[name, offset].state
            path, at, length = info["relative_path"], info["offset"], info["length"]
            if info.get("transform_descriptors"):
                raise UserError(f"{file}: {name} is stored by {info['transform_descriptors']}; save it without")
            if not isinstance(path, str) or Path(path).name != path:
                raise ValueError(f"{path} is no name of a file")
            inside = all(o + n <= whole for o, n, whole in zip(offset, size, shape, strict=True))
            if not inside or not all(isinstance(n, int) and n >= 0 for n in (at, length)):
                raise ValueError(f"a piece of {name} lies outside it")
            pieces.append(Piece(offset, size, path, at, length))
        if sum(math.prod(piece.size) for piece in pieces) != math.prod(shape):
            raise UserError(f"{file}: {name} has {HOLE}; {DAMAGED}")
        known = isinstance(dtype, torch.dtype) and dtype in FLOATS.values()
        tensors[str(name)] = Tensors(file, shape, dtype if known else str(dtype), tuple(pieces))
    return tensors, {str(name) for name in objects}


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError("sizes that are no whole numbers")
    return tuple(value)


def says_nothing(name: str) -> bool:
    """A tensor or object of theirs that is no part of the model."""
    beside = r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|opt_param_scheduler"
    return bool(re.match(beside, name) or re.search(r"\._extra_state(/shard_[\d._]+)?$", name))
