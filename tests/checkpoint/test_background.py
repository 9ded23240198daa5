"""Training goes on while a checkpoint is written, and the checkpoint is of the moment when it was asked for."""

from pathlib import Path

import torch.distributed as dist

from lamella.checkpoint import disk, manifest, series, store
from lamella.checkpoint.background import Background
from lamella.errors import UserError
from lamella.parallel.local import run_local
from tests.checkpoint.workers import VALUES, empty, filled, joined, pairs, true


def save_twice(folder: Path) -> list[str]:
    """Saves 100, loses its state at once, finishes; fails at 200; saves 300 into the copies of 100."""
    with joined() as rank:
        background, told = Background(), []
        held = filled(rank, 2, 1)
        values = dict(VALUES)

        def save(step: int) -> None:
            beside = {"notes.txt": lambda: b"later"}
            path = series.step_folder(folder, step)
            background.save(path, held, values, beside, lambda: told.append(f"published {step}"))

        save(100)
        values["step"] = -1
        for view, _ in pairs(held):
            view.zero_()
        assert background.finish() is None and not background.busy
        copies = [view.data_ptr() for x in background.kept.values() for view in x.held.values()]

        right = manifest.write

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        manifest.write = full
        save(200)
        failure = background.finish()
        assert isinstance(failure, UserError)
        told.append(str(failure))
        manifest.write = right

        held = filled(rank, 2, 1)
        dist.barrier()
        save(300)
        assert background.finish() is None
        assert copies == [view.data_ptr() for x in background.kept.values() for view in x.held.values()]
        return told


def test_saves_beside_training(tmp_path: Path):
    first, second = (o.value for o in run_local(2, save_twice, tmp_path, timeout=60))
    cannot = f"{tmp_path}/step-00000200: cannot save: No space left on device; {disk.CURES[28]}"
    assert first == second == ["published 100", cannot, "published 300"]
    assert series.steps(tmp_path) == [100, 300]
    for step in (100, 300):
        path, held = series.step_folder(tmp_path, step), empty(0, 1, 1)
        store.load(path, held)
        assert true(held)
        assert store.read_file(path, "notes.txt") == b"later"
    assert store.read_values(series.step_folder(tmp_path, 100)) == VALUES


def test_one_process_needs_no_group(tmp_path: Path):
    background = Background()
    background.save(series.step_folder(tmp_path, 1), filled(0, 1, 1), VALUES, {}, lambda: None)
    assert background.finish() is None
    held = empty(0, 1, 1)
    store.load(series.step_folder(tmp_path, 1), held)
    assert true(held)
