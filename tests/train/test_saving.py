"""Checkpoints while training goes on: killed in the middle, refused by the disk, damaged, pruned, mirrored."""

import json
import shutil
import signal
from pathlib import Path
from random import Random

import pytest

from lamella.checkpoint import series, store
from lamella.config import RunConfig, change
from lamella.errors import UserError
from lamella.parallel.local import exit_code, run_local
from lamella.train import loop
from lamella.train.metrics_file import read_metrics
from tests.checkpoint.damages import flip
from tests.corpus import tiny_run
from tests.train.states import assert_equal, history, whole_state
from tests.train.workers import say_into, train_and_die, train_on_a_full_disk


def with_checkpoints(config: RunConfig, **options) -> RunConfig:
    train = config.train.model_dump(mode="json")
    return change(config, train=train | {"checkpoint": train["checkpoint"] | options})


def trained(config: RunConfig, nproc: int = 1) -> RunConfig:
    assert exit_code(told(nproc, loop.enter, config)) == 0
    return config


def told(nproc: int, function, config: RunConfig, *args):
    """Outcomes; what the first process says is in `said`."""
    return run_local(nproc, say_into, said(config), function, config, *args, timeout=120)


def said(config: RunConfig) -> Path:
    return config.folder.with_name(f"{config.name}.said")


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    return trained(tiny_run(corpus, tmp_path_factory.mktemp("saving")), 2)


@pytest.fixture(scope="module")
def final(uninterrupted):
    return whole_state(uninterrupted, 1)[0]


@pytest.fixture
def copied(uninterrupted, tmp_path) -> RunConfig:
    """The finished run, to be harmed."""
    config = change(uninterrupted, runs=str(tmp_path))
    shutil.copytree(uninterrupted.folder, config.folder)
    return config


def checkpoints(config: RunConfig) -> Path:
    return config.folder / "checkpoints"


def assert_finishes(config: RunConfig, finished: RunConfig, final: dict, nproc: int = 2) -> None:
    trained(config, nproc)
    assert history(config) == history(finished)
    assert_equal(whole_state(config, 1)[0], final)


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n < 2 else [pytest.mark.full]) for n in range(50)]
)
def test_killed_at_a_random_moment_of_a_save(number, corpus, tmp_path, uninterrupted, final):
    random = Random(number)
    config = with_checkpoints(tiny_run(corpus, tmp_path), background=number % 5 > 0)
    victim, step, seconds = random.randrange(2), random.choice([2, 4]), random.uniform(0, 0.15)
    outcomes = run_local(2, train_and_die, config, victim, step, seconds, timeout=120)
    assert outcomes[victim].code == -signal.SIGKILL and outcomes[1 - victim].code == 1
    whole, lines = series.newest_whole(checkpoints(config))
    assert lines == [] and (whole is None or series.step_of(whole) in (2, 4))
    assert_finishes(config, uninterrupted, final)


def test_in_the_foreground_it_is_the_same(corpus, tmp_path, uninterrupted, final):
    config = with_checkpoints(tiny_run(corpus, tmp_path), background=False)
    assert_finishes(config, uninterrupted, final)
    for step in (2, 4, 6):
        ours, theirs = (series.step_folder(checkpoints(one), step) for one in (config, uninterrupted))
        for name in ("__0_0.distcp", "__1_0.distcp"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_a_disk_that_is_full_for_a_while_costs_that_checkpoint_alone(corpus, tmp_path, uninterrupted, final):
    config = tiny_run(corpus, tmp_path)
    outcomes = told(2, train_on_a_full_disk, config, [2])
    assert exit_code(outcomes) == 0
    assert series.steps(checkpoints(config)) == [4, 6]
    assert sorted(p.name for p in checkpoints(config).iterdir()) == ["step-00000004", "step-00000006"]
    assert (
        "step 2 is not saved, training goes on and saves again in 2 steps: "
        f"{checkpoints(config)}/step-00000002: cannot save: No space left on device; free some space"
    ) in said(config).read_text()
    assert history(config) == history(uninterrupted)
    assert_equal(whole_state(config, 1)[0], final)


def test_the_last_checkpoint_must_be_saved(corpus, tmp_path, uninterrupted, final):
    config = tiny_run(corpus, tmp_path)
    with pytest.raises(UserError, match="step-00000006: cannot save: No space left on device; free some space"):
        told(2, train_on_a_full_disk, config, [6])
    assert series.steps(checkpoints(config)) == [2, 4]
    assert_finishes(config, uninterrupted, final)


def test_a_damaged_newest_checkpoint_is_passed_over(copied, uninterrupted, final):
    flip(checkpoints(copied) / "step-00000006" / "__1_0.distcp")
    assert_finishes(copied, uninterrupted, final)
    lines = said(copied).read_text()
    assert f"passed over step-00000006: {checkpoints(copied)}/step-00000006/__1_0.distcp: altered" in lines
    assert f"continues from {checkpoints(copied)}/step-00000004" in lines
    assert (checkpoints(copied) / "step-00000006.damaged").is_dir()
    assert series.steps(checkpoints(copied)) == [2, 4, 6]


def test_all_damaged_is_said_and_nothing_is_lost(copied):
    for step in (2, 4, 6):
        flip(series.step_folder(checkpoints(copied), step) / "__0_0.distcp")
    before = {p: p.read_bytes() for p in copied.folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"no whole checkpoint is left: .*; bring one back"):
        told(2, loop.enter, copied)
    assert {p: p.read_bytes() for p in before} == before


def test_metrics_come_back_with_the_checkpoint(copied, uninterrupted):
    (copied.folder / "metrics.jsonl").unlink()
    longer = change(copied, train=copied.train.model_dump(mode="json") | {"steps": 7})
    trained(longer)
    lines = read_metrics(longer.folder / "metrics.jsonl")
    assert lines[:6] == read_metrics(uninterrupted.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(7))


def test_which_stay(corpus, tmp_path):
    run = tiny_run(corpus, tmp_path)
    train = run.train.model_dump(mode="json") | {"evaluate": {"every": 1, "rows": 4}}
    train["checkpoint"] = {"every": 1, "keep": 1, "keep_every": 4, "keep_best": 1}
    config = trained(change(run, train=train))
    losses = {line["step"] + 1: line["heldout_loss"] for line in read_metrics(config.folder / "metrics.jsonl")}
    best = min(range(1, 6), key=lambda step: losses[step])  # of those whose loss is over as many rows; 6 is the newest
    kept = series.steps(checkpoints(config))
    assert {4, 6} <= set(kept) <= {4, 6, best, min(losses, key=lambda step: losses[step])}
    for step in kept:
        values = store.read_values(series.step_folder(checkpoints(config), step))
        assert values["heldout_loss"] == losses[step]


def test_a_mirror_brings_a_lost_folder_back(corpus, tmp_path, uninterrupted, final):
    url = f"file://{tmp_path}/mirror"
    config = trained(with_checkpoints(tiny_run(corpus, tmp_path / "a"), mirror=url, keep=2), 2)
    assert sorted(p.name for p in (tmp_path / "mirror").iterdir()) == ["step-00000004", "step-00000006"]
    shutil.rmtree(tmp_path / "mirror" / "step-00000006")
    moved = with_checkpoints(tiny_run(corpus, tmp_path / "b"), mirror=url)  # another machine
    assert_finishes(moved, uninterrupted, final)
    assert "it was fetched from the mirror" in said(moved).read_text()
    assert json.loads((tmp_path / "mirror" / "step-00000006" / "run.json").read_text())["step"] == 6
    assert history(config) == history(moved)


def test_a_mirror_that_is_away_is_told_and_costs_nothing(corpus, tmp_path):
    mirror = tmp_path / "mirror"
    config = with_checkpoints(tiny_run(corpus, tmp_path / "a"), mirror=f"file://{mirror}")
    mirror.write_text("no folder")
    trained(config)
    assert series.steps(checkpoints(config)) == [2, 4, 6]
    line = f"step 2 is saved, but: train.checkpoint.mirror=file://{mirror}: cannot be written"
    assert line in said(config).read_text()
