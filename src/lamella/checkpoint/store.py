"""Checkpoints of any layout: saved by all ranks together, published at once or not at all, verified before use.

    checkpoints/step-00000100/   __0_0.distcp, __1_0.distcp, ...   each rank's pieces
                                 .metadata                         which piece lies where (DCP's)
                                 run.json                          plain values: step, data position, configuration
                                 manifest.json                     sizes and digests of all of these
                                 metrics.jsonl.gz                  the metrics up to the step
    checkpoints/step-00000200.tmp/                                 unfinished: nobody reads it, the next save clears it

A published checkpoint is never written again: saving a step that is already there is refused, so two runs that share a
folder by mistake cannot mix, and whatever happens to a save the earlier checkpoints are whole.
"""

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from lamella.checkpoint import manifest
from lamella.checkpoint.disk import disk_error, disk_errors
from lamella.checkpoint.files import VALUES, Produce, Reader, Writer
from lamella.checkpoint.planner import LoadPlanner, Pieces, SavePlanner
from lamella.errors import UserError

T = TypeVar("T")


def save(
    path: Path,
    tensors: Mapping[str, Pieces],
    values: dict[str, Any],
    group: ProcessGroup | None = None,
    beside: dict[str, Produce] | None = None,
) -> None:
    """Writes and publishes a checkpoint at `path`: collective over the group (default: all processes).

    Every process gives its pieces by global name; `values`, plain JSON, and `beside`, further files by name, are the
    first process's. With NCCL as the default backend a gloo group keeps the bookkeeping off the devices. Raises, on
    every process, UserError where the disk does not take it or the checkpoint is already there, and RuntimeError where
    the pieces leave a hole or overlap.
    """
    writer = Writer(path, values, beside or {})
    try:
        with _without_dist_warning():
            state_dict_saver.save(
                dict(tensors),
                storage_writer=writer,
                planner=SavePlanner(),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:
        if _seat(group)[0] == 0:
            # A full disk wants the space, and DCP has gathered this from all ranks: nobody writes any more.
            shutil.rmtree(writer.folder, ignore_errors=True)
        raise _cause(error, path, "cannot save") from error


def load(
    path: Path,
    tensors: dict[str, Pieces],
    group: ProcessGroup | None = None,
    partial: bool = False,
    verified: bool = False,
) -> None:
    """Verifies the checkpoint at `path` and reads it into the live views: collective over the group.

    Raises the same UserError on every process, before any view is touched: for each damaged file, or for a name, shape
    or dtype that does not match. With `partial` the checkpoint may hold tensors that no process asks for; with
    `verified` its files are not compared again, because `verify` was called before.
    """
    if not verified:
        verify(path, group)
    readers: list[Reader] = []
    together(lambda: readers.append(Reader(path)), path, group)
    try:
        with _without_dist_warning():
            state_dict_loader.load(
                dict(tensors),
                storage_reader=readers[0],
                planner=LoadPlanner(path, partial),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:
        raise _cause(error, path, "cannot load") from error


def verify(path: Path, group: ProcessGroup | None = None) -> None:
    """Compares every file's digest: collective over the group. Raises Damaged that names each damaged one."""
    rank, ranks = _seat(group)
    damaged = together(lambda: manifest.damage(path, rank, ranks), path, group)
    if any(damaged):
        raise manifest.Damaged("; ".join(sorted(itertools.chain(*damaged))))


def names(path: Path) -> list[str]:
    """The tensors of a checkpoint, to be verified before."""
    return sorted(Reader(path).metadata.state_dict_metadata)


def read_values(path: Path) -> dict[str, Any]:
    """The plain values saved with a checkpoint. Raises UserError where they are damaged."""
    return json.loads(read_file(path, VALUES) or b"")


def read_file(path: Path, name: str) -> bytes | None:
    """A whole file of a checkpoint, or None where it has none of that name. Raises UserError where it is damaged."""
    with disk_errors(path, "cannot load"):
        entry = manifest.read(path).get(name)
        if entry is None:
            return None
        line = manifest.fault(path / name, entry)
        if line:
            raise manifest.Damaged(line)
        return (path / name).read_bytes()


def together(function: Callable[[], T], path: Path, group: ProcessGroup | None = None) -> list[T]:
    """What `function` returns on each process; where it raises on any of them, the first such error on all."""
    try:
        with disk_errors(path, "cannot load"):
            mine: T | Exception = function()
    except Exception as error:
        mine = error
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone *= dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    for result in everyone:
        if isinstance(result, Exception):
            raise result
    return everyone


def _seat(group: ProcessGroup | None) -> tuple[int, int]:
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def _cause(error: CheckpointException, path: Path, what: str) -> BaseException:
    """The one exception behind what DCP gathered from the ranks: what the user can mend goes first."""
    failures = [failure for _, (failure, _) in sorted(error.failures.items())]
    for failure in failures:
        if isinstance(failure, UserError):
            return failure
    for failure in failures:
        if isinstance(failure, OSError):
            return disk_error(failure, path, what)
    return failures[0]


@contextmanager
def _without_dist_warning() -> Iterator[None]:
    """A process without torch.distributed saves alone on purpose; DCP warns of it."""
    if dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
