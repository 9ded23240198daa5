"""Which checkpoint a run continues from, and which it keeps."""

import json
import shutil
from pathlib import Path

import pytest

from lamella.checkpoint import series, store
from lamella.checkpoint.mirror import Mirror
from lamella.checkpoint.series import Keep
from lamella.errors import UserError
from lamella.parallel.local import run_local
from tests.checkpoint.damages import flip
from tests.checkpoint.workers import VALUES, empty, filled, find_newest, message, true


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        store.save(series.step_folder(tmp_path, step), filled(0, 1, 1), VALUES)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_only_published_steps_are_found(tmp_path: Path):
    assert series.steps(tmp_path / "none") == [] and series.latest(tmp_path / "none") is None
    for name in ("step-00000300", "step-00000020", "step-123456789", "step-00000400.tmp", "step-7", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000500.damaged").mkdir()
    assert series.steps(tmp_path) == [20, 300, 123456789]
    assert series.latest(tmp_path) == tmp_path / "step-123456789"


def test_the_newest_whole_one_is_taken(three: Path):
    assert series.newest_whole(three) == (three / "step-00000003", [])
    assert series.newest_whole(three / "none") == (None, [])


def test_damaged_ones_are_passed_over_named_and_set_aside_on_every_rank(three: Path):
    flip(three / "step-00000003" / "__0_0.distcp")
    (three / "step-00000002" / "manifest.json").unlink()
    outcomes = run_local(2, find_newest, three, timeout=60)
    lines = [
        f"passed over step-00000003: {three}/step-00000003/__0_0.distcp: altered",
        f"passed over step-00000002: {three}/step-00000002/manifest.json: missing",
    ]
    assert [o.value for o in outcomes] == [(three / "step-00000001", lines)] * 2
    assert names(three) == ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]
    store.save(three / "step-00000003", filled(0, 1, 1), VALUES)  # its place is free
    assert series.newest_whole(three) == (three / "step-00000003", [])


def test_without_a_whole_one_nothing_is_moved(three: Path):
    for step in (1, 2, 3):
        flip(series.step_folder(three, step) / "run.json")
    error = message(series.newest_whole, three) or ""
    assert error.startswith(f"{three}: no whole checkpoint is left: {three}/step-00000003/run.json: altered; ")
    assert error.endswith("; bring one back, or give the run another name")
    assert series.steps(three) == [1, 2, 3]


def test_prune_keeps_the_newest(tmp_path: Path):
    for step in (1, 2, 3, 4):
        (series.step_folder(tmp_path, step)).mkdir()
        (series.step_folder(tmp_path, step) / "file").write_text("")
    for name in ("step-00000002.tmp", "step-00000004.tmp", "step-00000005.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    assert series.prune(tmp_path, Keep(3)) == [1]
    assert series.steps(tmp_path) == [2, 3, 4]
    assert series.prune(tmp_path, Keep(1)) == [2, 3]
    assert series.prune(tmp_path, Keep(1)) == []
    assert names(tmp_path) == ["step-00000004", "step-00000005.tmp"]  # the latter may be being written
    with pytest.raises(AssertionError):
        series.prune(tmp_path, Keep(0))


def test_prune_keeps_every_so_many_and_the_best(tmp_path: Path):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5, 60: None, 70: 4.0}
    for step, loss in losses.items():
        folder = series.step_folder(tmp_path, step)
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({} if loss is None else {series.LOSS: loss}))
    assert series.prune(tmp_path, Keep(1, every=40, best=2)) == [10, 50, 60]
    assert series.steps(tmp_path) == [20, 30, 40, 70]
    assert series.prune(tmp_path, Keep(2, best=1)) == [30]


def test_a_mirror_has_whole_checkpoints_alone(three: Path):
    mirror = Mirror(f"file://{three}/there")
    assert mirror.steps() == []
    mirror.push(three / "step-00000002")
    mirror.push(three / "step-00000003")
    mirror.push(three / "step-00000003")
    (three / "there" / "step-00000003" / "manifest.json").unlink()  # cut off in the middle
    assert mirror.steps() == [2]
    mirror.push(three / "step-00000003")
    assert mirror.steps() == [2, 3]
    mirror.drop("step-00000002")
    mirror.drop("step-00000002")
    assert mirror.steps() == [3] and names(three / "there") == ["step-00000003"]


def test_what_the_folder_has_lost_comes_from_the_mirror(three: Path):
    mirror = Mirror("memory://lamella-test-series")  # another file system of fsspec
    for step in (2, 3):
        mirror.push(series.step_folder(three, step))
    flip(three / "step-00000003" / "__0_0.distcp")
    altered, fetched = "passed over step-00000003: {}/__0_0.distcp: altered", "it was fetched from the mirror"
    path = three / "step-00000003"
    assert series.newest_whole(three, mirror) == (path, [altered.format(path), fetched])
    held = empty(0, 1, 1)
    store.load(path, held)
    assert true(held)
    assert names(three) == [f"step-0000000{n}" for n in ("1", "2", "3", "3.damaged")]
    for name in names(three):
        shutil.rmtree(three / name)
    assert series.newest_whole(three, mirror) == (path, [fetched])
    shutil.rmtree(path)
    mirror.fs.pipe_file(f"{mirror.root}/{path.name}/run.json", b"{}")
    path, lines = series.newest_whole(three, mirror)
    assert path == three / "step-00000002" and lines[0].endswith("step-00000003/run.json: truncated")


def test_a_mirror_that_does_not_answer_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"mirror=nonsense://x: no such place \(.*nonsense.*\); mend it, or leave out"):
        Mirror("nonsense://x")
    (tmp_path / "file").write_text("")
    mirror = Mirror(f"file://{tmp_path}/file/there")
    store.save(series.step_folder(tmp_path, 1), filled(0, 1, 1), VALUES)
    with pytest.raises(UserError, match="cannot be written"):
        mirror.push(series.step_folder(tmp_path, 1))
