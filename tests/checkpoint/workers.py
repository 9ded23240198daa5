"""A small model's state under any layout, and what the tests' processes run (importable by name, for `run_local`)."""

import math
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from lamella.checkpoint import files, manifest, series, store
from lamella.checkpoint.boxes import pieces
from lamella.checkpoint.planner import Pieces
from lamella.errors import UserError
from lamella.nn.initializers import zeros
from lamella.nn.shard import Shard, Whole

VALUES = {"step": 100, "rate": 0.1 + 0.2, "seed": 2**63 + 1, "data": {"row": 12, "files": ["a", "ü"]}, "none": None}

# name: (shape, split, segments); what is split divides by up to 4 ranks
TENSORS: dict[str, tuple[tuple[int, ...], int | None, tuple[int, ...] | None]] = {
    "column": ((16, 6), 0, None),
    "row": ((6, 16), 1, None),
    "fused": ((24, 5), 0, (16, 4, 4)),
    "fused_row": ((5, 12), 1, (4, 8)),
    "experts": ((3, 8, 4), 1, None),
    "norm": ((7,), None, None),
    "scale": ((), None, None),
}


class Part(Whole):
    """Rank `rank` of a tensor group of `size`, for the places that it gives."""

    def __init__(self, rank: int, size: int):
        Shard.__init__(self, rank, size, torch.float32, 0.02, 1)


def whole(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The global tensor: random bits, so NaNs with payloads, infinities, denormals and both zeros are among them."""
    shape = TENSORS[name][0]
    generator = torch.Generator().manual_seed(len(name) + math.prod(shape))
    random = torch.randint(256, (math.prod(shape), dtype.itemsize), dtype=torch.uint8, generator=generator)
    return random.view(dtype).view(shape)


def empty(rank: int, tensor: int, data: int, dtype: torch.dtype = torch.float32, limit: int = 100) -> dict[str, Pieces]:
    """Rank `rank`'s pieces under tensor x data, filled with ones: ZeRO cuts the flat state of a tensor rank evenly."""
    shard = Part(rank % tensor, tensor)
    places = {
        name: shard.parameter(shape, zeros, split=split, segments=segments)
        for name, (shape, split, segments) in TENSORS.items()
    }
    share = -(-sum(p.numel() for p in places.values()) // data)
    first, at, held = rank // tensor * share, 0, {}
    flat = torch.ones(share, dtype=dtype)
    for name, parameter in places.items():
        low, high = max(first, at), min(first + share, at + parameter.numel())
        fragment = flat[low - first : max(low, high) - first]
        place = parameter.place
        found = pieces(fragment, parameter.shape, low - at, place.boxes, limit)
        held[name] = Pieces(place.shape, dtype, found, place.owner)
        at += parameter.numel()
    return held


def filled(rank: int, tensor: int, data: int, dtype: torch.dtype = torch.float32) -> dict[str, Pieces]:
    held = empty(rank, tensor, data, dtype)
    for view, true in pairs(held):
        view.copy_(true)
    return held


def pairs(held: dict[str, Pieces]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each view with the part of the global tensor that belongs there."""
    for name, x in held.items():
        for offset, view in x.held.items():
            yield view, whole(name, x.dtype)[tuple(slice(o, o + n) for o, n in zip(offset, view.shape, strict=True))]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def true(held: dict[str, Pieces]) -> bool:
    """Whether every view holds what belongs there, bit for bit."""
    return all(torch.equal(bits(view), bits(want)) for view, want in pairs(held))


@contextmanager
def joined() -> Iterator[int]:
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    yield dist.get_rank()
    dist.destroy_process_group()


def gloo() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def message(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """The UserError or RuntimeError that it raises."""
    try:
        function(*args, **kwargs)
    except (UserError, RuntimeError) as error:
        return str(error)
    return None


def save(path: Path, tensor: int, data: int, dtype: torch.dtype = torch.float32) -> None:
    with joined() as rank:
        store.save(path, filled(rank, tensor, data, dtype), VALUES, gloo())


def load(path: Path, tensor: int, data: int, dtype: torch.dtype = torch.float32) -> tuple[bool, dict[str, Any]]:
    with joined() as rank:
        held = empty(rank, tensor, data, dtype)
        store.load(path, held, gloo())
        return true(held), store.read_values(path)


def load_damaged(paths: list[Path]) -> list[tuple[str | None, bool]]:
    """For each checkpoint the error, and whether the views were left alone."""
    results = []
    with joined() as rank:
        for path in paths:
            held = empty(rank, 1, 2)
            results.append((message(store.load, path, held), all(bool((view == 1).all()) for view, _ in pairs(held))))
    return results


def save_wrong(path: Path) -> dict[str, str | None]:
    """The errors of saves whose pieces are wrong on one rank or the other."""
    with joined() as rank:
        found = {}
        for case in ("hole", "overlap", "nobody", "shapes", "compensated"):
            held = filled(rank, 2, 1)
            if case == "hole" and rank == 1:
                held["column"].held.popitem()
            if case == "overlap" and rank == 1:
                held["norm"].owner = True
            if case == "nobody":
                held["norm"].owner = False
            if case == "shapes" and rank == 1:
                held["row"].shape = torch.Size((6, 17))
            if case == "compensated":  # 16 x 6 elements in all, the rows 4 to 11 twice
                held["column"] = Pieces((16, 6), torch.float32, [((4 * rank, 0), torch.ones(8, 6))])
            found[case] = message(store.save, path, held, VALUES)
    return found


def save_failing(folder: Path) -> list[str | None]:
    """Saves 100; fails to save 200 where rank 1 may write 2 kB a file, and where the manifest cannot be; saves it."""
    with joined() as rank:
        held, found = filled(rank, 2, 1), []
        store.save(series.step_folder(folder, 100), held, VALUES)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a real EFBIG
        found.append(message(store.save, series.step_folder(folder, 200), held, VALUES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with mock.patch.object(manifest, "write", side_effect=OSError(28, "No space left on device")):
            found.append(message(store.save, series.step_folder(folder, 200), held, VALUES))
        if rank == 0:
            found.append(" ".join(sorted(p.name for p in folder.iterdir())))
        dist.barrier()
        found.append(message(store.save, series.step_folder(folder, 200), held, VALUES))
        found.append(message(store.save, series.step_folder(folder, 200), held, VALUES))
    return found


def save_killed(folder: Path, victim: int, where: str) -> None:
    """Saves 100, and dies while saving 200: in the middle of its pieces, or (rank 0) before it publishes."""

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with joined() as rank:
        held = filled(rank, 2, 1)
        store.save(series.step_folder(folder, 100), held, VALUES)
        if rank == victim and where == "pieces":
            serialised = [files._serialised, files._serialised, die]
            files._serialised = lambda *args: serialised.pop(0)(*args)
        if rank == victim and where == "manifest":
            manifest.write = die
        store.save(series.step_folder(folder, 200), held, VALUES)


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    with joined():
        return series.newest_whole(folder, group=gloo())
