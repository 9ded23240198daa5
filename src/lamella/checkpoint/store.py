"""Checkpoints of any layout: saved by all ranks together, published at once or not at all, verified before use.

    checkpoints/step-00000100/   __0_0.distcp, __1_0.distcp, ...   each rank's pieces
                                 .metadata                         which piece lies where (DCP's)
                                 run.json                          plain values: step, data position, configuration
                                 manifest.json                     sizes and digests of all of these
    checkpoints/step-00000200.tmp/                                 unfinished: nobody reads it, the next save clears it

A published checkpoint is never written again: saving a step that is already there is refused, so two runs that share a
folder by mistake cannot mix, and whatever happens to a save the earlier checkpoints are whole.
"""

import errno
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from lamella.checkpoint import manifest
from lamella.checkpoint.files import UNPUBLISHED, VALUES, Reader, Writer, unpublished
from lamella.checkpoint.planner import LoadPlanner, Pieces, SavePlanner
from lamella.errors import UserError

T = TypeVar("T")
CURES = {
    errno.ENOSPC: "free some space, or keep fewer checkpoints",
    errno.EDQUOT: "free some space, or keep fewer checkpoints",
    errno.ENOENT: "every machine must see this folder; choose one on a file system that they share",
    errno.ENOTDIR: "a file stands where a folder should be; move it away",
    errno.EEXIST: "a file stands where a folder should be; move it away",
}
OTHER_CURE = "choose a folder that can be read and written"


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies: folder/step-00000100."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps of the published checkpoints, in order. Raises UserError where the folder cannot be read."""
    return sorted(_found(folder, suffix=""))


def latest(folder: Path) -> Path | None:
    """The newest published checkpoint. Raises UserError where the folder cannot be read."""
    found = steps(folder)
    return step_folder(folder, found[-1]) if found else None


def save(path: Path, tensors: dict[str, Pieces], values: dict[str, Any], group: ProcessGroup | None = None) -> None:
    """Writes and publishes a checkpoint at `path`: collective over the group (default: all processes).

    Every process gives its pieces by global name; `values`, plain JSON, are the first process's. With NCCL as the
    default backend a gloo group keeps the bookkeeping off the devices. Raises, on every process, UserError where the
    disk does not take it or the checkpoint is already there, and RuntimeError where the pieces leave a hole or overlap.
    """
    writer = Writer(path, values)
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
    try:
        with _without_dist_warning():
            state_dict_loader.load(
                dict(tensors),
                storage_reader=Reader(path),
                planner=LoadPlanner(path, partial),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:
        raise _cause(error, path, "cannot load") from error


def verify(path: Path, group: ProcessGroup | None = None) -> None:
    """Compares every file's digest: collective over the group. Raises UserError for each damaged one."""
    rank, ranks = _seat(group)
    damaged = together(lambda: manifest.damage(path, rank, ranks), path, group)
    if any(damaged):
        raise UserError(f"{'; '.join(sorted(itertools.chain(*damaged)))}; {manifest.CURE}")


def names(path: Path) -> list[str]:
    """The tensors of a checkpoint, to be verified before."""
    return sorted(Reader(path).read_metadata().state_dict_metadata)


def read_values(path: Path) -> dict[str, Any]:
    """The plain values saved with a checkpoint. Raises UserError where they are damaged."""
    with _disk_errors(path, "cannot load"):
        entry = manifest.read(path)[VALUES]
        line = manifest.fault(path / VALUES, entry)
        if line:
            raise UserError(f"{line}; {manifest.CURE}")
        return json.loads((path / VALUES).read_bytes())


def prune(folder: Path, keep: int) -> None:
    """Deletes all published checkpoints but the newest `keep`, and what interrupted saves have left. For one process.

    Raises UserError where the disk refuses.
    """
    assert keep >= 1, "the newest checkpoint is never deleted"
    published = steps(folder)
    with _disk_errors(folder, "cannot delete old checkpoints"):
        for step in published[:-keep]:
            path = step_folder(folder, step)
            if unpublished(path).exists():
                shutil.rmtree(unpublished(path))
            path.rename(unpublished(path))  # half deleted it must not be found
        for step in _found(folder, UNPUBLISHED):
            if published and step <= published[-1]:  # a newer one may be being written
                shutil.rmtree(unpublished(step_folder(folder, step)))


def together(function: Callable[[], T], path: Path, group: ProcessGroup | None = None) -> list[T]:
    """What `function` returns on each process; where it raises on any of them, the first such error on all."""
    try:
        with _disk_errors(path, "cannot load"):
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


def _found(folder: Path, suffix: str) -> Iterator[int]:
    with _disk_errors(folder, "cannot look for checkpoints"):
        names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    for name in names:
        match = re.fullmatch(r"step-(\d{8,})" + re.escape(suffix), name)
        if match:
            yield int(match[1])


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
            return _disk_error(failure, path, what)
    return failures[0]


@contextmanager
def _disk_errors(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _disk_error(error, path, what) from error


def _disk_error(error: OSError, path: Path, what: str) -> UserError:
    where = f" {error.filename}" if error.filename and str(error.filename) != str(path) else ""
    cure = CURES.get(error.errno or 0, OTHER_CURE)
    return UserError(f"{path}: {what}: {error.strerror or error}{where}; {cure}")


@contextmanager
def _without_dist_warning() -> Iterator[None]:
    """A process without torch.distributed saves alone on purpose; DCP warns of it."""
    if dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
