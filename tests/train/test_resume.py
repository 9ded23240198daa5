"""A run that was stopped or killed goes on as if nothing had happened, also under another layout."""

import random
import shutil
import signal

import pytest
import torch

from lamella.config import change
from lamella.parallel.local import exit_code, run_local
from lamella.train import loop
from tests.corpus import tiny_run
from tests.train.states import assert_equal, history, whole_state
from tests.train.workers import train_and_strike

STEPS = 6
SAMPLE = random.Random(0).sample(range(STEPS), 5)
# Five random steps each with --full, two of them always.
STRIKES = [
    pytest.param(signum, step, id=f"{signum.name}-{step}", marks=[] if number < 2 else [pytest.mark.full])
    for signum in (signal.SIGTERM, signal.SIGKILL)
    for number, step in enumerate(SAMPLE)
]


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    config = tiny_run(corpus, tmp_path_factory.mktemp("runs"))
    assert exit_code(run_local(2, loop.enter, config, timeout=120)) == 0
    assert len(history(config)) == STEPS
    return config


@pytest.fixture(scope="module")
def final(uninterrupted):
    return whole_state(uninterrupted, 1)[0]


@pytest.mark.parametrize(("signum", "step"), STRIKES)
def test_stopped_and_resumed_bit_for_bit(signum, step, corpus, tmp_path, uninterrupted, final):
    config = tiny_run(corpus, tmp_path)
    outcomes = run_local(2, train_and_strike, config, step % 2, step, signum, timeout=120)
    if signum == signal.SIGTERM:
        stopped_before_the_end = step < STEPS - 1
        assert exit_code(outcomes) == (75 if stopped_before_the_end else 0)
        assert len(history(config)) == step + 1  # the running step ended, and was saved
    else:
        assert exit_code(outcomes) == 1
    assert exit_code(run_local(2, loop.enter, config, timeout=120)) == 0
    assert history(config) == history(uninterrupted)
    assert_equal(whole_state(config, 1)[0], final)


def test_same_seed_same_bits(corpus, tmp_path, uninterrupted, final):
    config = tiny_run(corpus, tmp_path)
    assert exit_code(run_local(2, loop.enter, config, timeout=120)) == 0
    assert history(config) == history(uninterrupted)
    assert_equal(whole_state(config, 1)[0], final)


LAYOUTS = [
    (1, {}),
    (4, {}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence_parallel": True}),
    (4, {"tensor": 2, "micro_batch": 2}),
    (2, {"pipeline": 2}),
    (2, {"expert": 2}),
    (2, {"zero": 2}),
    (2, {"zero": 3}),
]


@pytest.mark.parametrize(("nproc", "layout"), LAYOUTS, ids=lambda v: str(v).replace(" ", ""))
def test_saved_on_two_continued_under_another_layout(nproc, layout, corpus, tmp_path, uninterrupted, final):
    moved, middle = (tiny_run(corpus, tmp_path, name=name, **layout) for name in ("moved", "middle"))
    assert_continues(nproc, moved, middle, uninterrupted, final)


def assert_continues(nproc, moved, middle, finished, final):
    """`moved` holds what `finished` has saved, bit for bit, and `middle` goes on from its middle to its losses."""
    shutil.copytree(finished.folder, moved.folder)
    state, ranks = whole_state(moved, nproc)
    assert_equal(state, final)  # masters and moments
    for _, parameters, places, step in ranks:
        assert step == STEPS
        for name, parameter in parameters.items():
            for box in places[name]:
                assert torch.equal(parameter[box.local_slices], final[f"master/{name}"][box.whole_slices])

    shutil.copytree(finished.folder, middle.folder)
    shutil.rmtree(middle.folder / "checkpoints" / "step-00000006")
    assert exit_code(run_local(nproc, loop.enter, middle, timeout=120)) == 0
    for got, want in zip(history(middle), history(finished), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert got.get("heldout_loss", 0) == pytest.approx(want.get("heldout_loss", 0), rel=1e-6)


EIGHT = {
    "single": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "expert": (2, {"expert": 2}),
    "zero1": (2, {"zero": 1}),
    "zero2": (2, {"zero": 2}),
    "zero3": (2, {"zero": 3}),
    "combined": (4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "zero": 1}),
}


@pytest.fixture(scope="module")
def saved_under(corpus, tmp_path_factory):
    """A finished run under each of EIGHT, made when it is asked for, with its final state."""
    found = {}

    def make(name):
        if name not in found:
            nproc, layout = EIGHT[name]
            config = tiny_run(corpus, tmp_path_factory.mktemp(name), **layout)
            assert exit_code(run_local(nproc, loop.enter, config, timeout=120)) == 0
            found[name] = config, whole_state(config, nproc)[0]
        return found[name]

    return make


@pytest.mark.full
@pytest.mark.parametrize("loading", EIGHT)
@pytest.mark.parametrize("saving", EIGHT)
def test_every_pair_of_layouts(saving, loading, corpus, tmp_path, saved_under):
    nproc, layout = EIGHT[loading]
    moved, middle = (tiny_run(corpus, tmp_path, name=name, **layout) for name in ("moved", "middle"))
    finished, final = saved_under(saving)
    assert_continues(nproc, moved, middle, finished, final)
    if saving == loading:
        assert history(middle) == history(finished)


def tied_run(corpus, runs, **options):
    """Four layers between tied embeddings."""
    config = tiny_run(corpus, runs, **options)
    model = config.model.model_dump(mode="json") | {"tie_embeddings": True}
    model["stack"][0]["repeat"] = 2
    return change(config, model=model)


@pytest.fixture(scope="module")
def piped(corpus, tmp_path_factory):
    """Its embedding lies at both ends of a pipeline."""
    config = tied_run(corpus, tmp_path_factory.mktemp("piped"), pipeline=2)
    assert exit_code(run_local(2, loop.enter, config, timeout=120)) == 0
    return config, whole_state(config, 2)[0]


@pytest.mark.parametrize(("nproc", "layout"), [(1, {}), (2, {"pipeline": 2, "schedule": "zbv"})], ids=["one", "zbv"])
def test_saved_by_a_pipeline_with_tied_embeddings(nproc, layout, corpus, tmp_path, piped):
    moved, middle = (tied_run(corpus, tmp_path, name=name, **layout) for name in ("moved", "middle"))
    assert_continues(nproc, moved, middle, *piped)


def test_a_longer_run_continues_the_shorter(corpus, tmp_path):
    config = tiny_run(corpus, tmp_path)
    constant = {"schedule": {"kind": "constant", "warmup_steps": 2}}
    long = change(config, train=config.train.model_dump(mode="json") | constant)
    short = change(long, name="short", train=long.train.model_dump(mode="json") | {"steps": 3})
    assert exit_code(run_local(1, loop.enter, long, timeout=120)) == 0
    assert exit_code(run_local(1, loop.enter, short, timeout=120)) == 0
    longer = change(long, name="short")
    assert exit_code(run_local(1, loop.enter, longer, timeout=120)) == 0
    losses = [[line["loss"] for line in history(run)] for run in (long, longer)]
    assert losses[0] == losses[1]
