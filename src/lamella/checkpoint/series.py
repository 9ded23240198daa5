"""The checkpoints of a run, in one folder: which there are, which to continue from, which to keep.

    checkpoints/step-00000100/           published
    checkpoints/step-00000200.tmp/       being written or deleted, or left by a kill: nobody reads it
    checkpoints/step-00000300.damaged/   passed over by a run that continued from an earlier one; never deleted here
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup

from lamella.checkpoint import store
from lamella.checkpoint.disk import disk_errors
from lamella.checkpoint.files import UNPUBLISHED, VALUES, unpublished
from lamella.checkpoint.manifest import Damaged
from lamella.checkpoint.mirror import Mirror
from lamella.errors import UserError

DAMAGED = ".damaged"
LOSS = "heldout_loss"  # in a checkpoint's values: what `Keep.best` compares


@dataclasses.dataclass(frozen=True)
class Keep:
    """The newest `last` stay, those of every `every`-th step, and the `best` of lowest held-out loss."""

    last: int
    every: int | None = None
    best: int = 0


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies: folder/step-00000100."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def steps(folder: Path) -> list[int]:
    """The steps of the published checkpoints, in order. Raises UserError where the folder cannot be read."""
    return sorted(_found(folder, suffix=""))


def latest(folder: Path) -> Path | None:
    """The newest published checkpoint. Raises UserError where the folder cannot be read."""
    found = steps(folder)
    return step_folder(folder, found[-1]) if found else None


def newest_whole(
    folder: Path, mirror: Mirror | None = None, group: ProcessGroup | None = None
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all what they were, compared; and a line for each that was passed over.

    Collective over the group. What the mirror alone has whole is fetched. A damaged checkpoint steps aside once a whole
    one is found, so that its step can be saved again. Raises UserError where there are checkpoints and none is whole.
    """
    first = not dist.is_initialized() or dist.get_rank(group) == 0
    damaged: list[_Candidate] = []
    faults: list[str] = []
    while True:
        # The first process alone looks: others may see a folder a moment later.
        found = store.together(lambda: _candidate(folder, mirror, damaged) if first else None, folder, group)[0]
        if found is None:
            break
        try:
            store.verify(step_folder(folder, found.step), group)
            break
        except Damaged as error:
            damaged.append(found)
            faults.append(error.what)
    if found is None:
        if faults:
            lines, cure = "; ".join(faults), "bring one back, or give the run another name"
            raise UserError(f"{folder}: no whole checkpoint is left: {lines}; {cure}")
        return None, []
    aside = [one.step for one in damaged if one.step != found.step]
    store.together(lambda: [_set_aside(folder, step) for step in aside] if first else None, folder, group)
    lines = [f"passed over {step_folder(folder, c.step).name}: {f}" for c, f in zip(damaged, faults, strict=True)]
    return step_folder(folder, found.step), lines + ["it was fetched from the mirror"] * found.fetched


@dataclasses.dataclass(frozen=True)
class _Candidate:
    step: int
    fetched: bool


def prune(folder: Path, keep: Keep) -> list[int]:
    """Deletes the published checkpoints that need not stay, and what interrupted saves have left. For one process.

    Returns the deleted steps. Raises UserError where the disk refuses.
    """
    assert keep.last >= 1, "the newest checkpoint is never deleted"
    published = steps(folder)
    stay = set(published[-keep.last :])
    if keep.every is not None:
        stay |= {step for step in published if step % keep.every == 0}
    if keep.best:
        losses = {step: loss for step in published if (loss := _loss(step_folder(folder, step))) is not None}
        stay |= set(sorted(losses, key=lambda step: losses[step])[: keep.best])
    old = [step for step in published if step not in stay]
    with disk_errors(folder, "cannot delete old checkpoints"):
        for step in old:
            path = step_folder(folder, step)
            if unpublished(path).exists():
                shutil.rmtree(unpublished(path))
            path.rename(unpublished(path))  # half deleted it must not be found
        for step in _found(folder, UNPUBLISHED):
            if published and step <= published[-1]:  # a newer one may be being written
                shutil.rmtree(unpublished(step_folder(folder, step)))
    return old


def _candidate(folder: Path, mirror: Mirror | None, damaged: list[_Candidate]) -> _Candidate | None:
    """The newest that was not found damaged, here before there."""
    here = {step for step in steps(folder) if not any(c.step == step for c in damaged)}
    there = {step for step in mirror.steps() if _Candidate(step, True) not in damaged} if mirror is not None else set()
    newest = max(here | there, default=None)
    if newest is None or newest in here or mirror is None:
        return None if newest is None else _Candidate(newest, fetched=False)
    _set_aside(folder, newest)
    mirror.fetch(newest, step_folder(folder, newest))
    return _Candidate(newest, fetched=True)


def _set_aside(folder: Path, step: int) -> None:
    path = step_folder(folder, step)
    aside = path.with_name(path.name + DAMAGED)
    if path.exists():
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)


def _found(folder: Path, suffix: str) -> Iterator[int]:
    with disk_errors(folder, "cannot look for checkpoints"):
        names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    for name in names:
        match = re.fullmatch(r"step-(\d{8,})" + re.escape(suffix), name)
        if match:
            yield int(match[1])


def _loss(path: Path) -> float | None:
    try:
        return json.loads((path / VALUES).read_bytes())[LOSS]
    except (OSError, ValueError, KeyError):
        return None
