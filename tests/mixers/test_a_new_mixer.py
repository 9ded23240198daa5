"""A new mixer is one file and, to train it, one YAML file: everything else finds it.

`tests/mixers/toy/` holds both. A `sitecustomize` of the test's own makes the folder part of `lamella.mixers` in every
process, which is what lying in `src/lamella/mixers/` would do; no line of the project changes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamella.config import change, dump
from tests.corpus import prepare_corpus, tiny_run

ROOT, TOY = Path(__file__).parent.parent.parent, Path(__file__).parent / "toy"
LINES = 60


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs `python -m WORDS` where the toy mixer is one of the mixers."""
    home = tmp_path_factory.mktemp("site")
    (home / "sitecustomize.py").write_text(f"import lamella.mixers\nlamella.mixers.__path__.append({str(TOY)!r})\n")

    def run(*words, cwd=ROOT):
        env = os.environ | {"PYTHONPATH": f"{home}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A run over a small corpus whose model is the YAML, found by its name."""
    home = tmp_path_factory.mktemp("toy")
    run = change(tiny_run(prepare_corpus(home), home / "runs", name="toy"))
    for folder in ("run", "model"):
        (home / folder).mkdir()
    (home / "model" / "average-nano.yaml").write_text((TOY / "average-nano.yaml").read_text())
    dump(run, home / "run" / "toy.yaml")
    return home / "run" / "toy.yaml"


def test_it_is_small():
    assert len((TOY / "average.py").read_text().splitlines()) < LINES


def test_it_is_none_of_ours():
    assert not list((ROOT / "src/lamella/mixers").glob("average.py"))


def test_the_contract_finds_it_and_holds(call):
    done = call("pytest", "tests/mixers/test_contract.py", "-q", "-k", "average", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 18, done.stdout[-500:]


def test_it_is_counted_and_trains(call, run_file):
    words = ["model=average-nano", "train.steps=2", "--nproc", 1]
    done = call("lamella", "train", run_file, *words, cwd=run_file.parent)
    assert done.returncode == 0, done.stderr
    mixers = 2 * (3 * 32 * 64 + 3 * 64 + 64 * 32) + 4 * 32 * 32  # two averages of 64 channels, one attention
    others = 2 * 3 * 32 * 48 + 2 * 512 * 32 + 6 * 32  # mlps, embedding and head, norms
    assert done.stdout.startswith(f"toy: {mixers + others:,} parameters")
    assert len((run_file.parent.parent / "runs" / "toy" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.full
def test_its_layouts_are_equal(call, run_file):
    words = ["--layout", "tensor=2,sequence_parallel=true", "--layout", "pipeline=2"]
    done = call("lamella", "verify", run_file, "model=average-nano", *words, cwd=run_file.parent)
    assert done.returncode == 0, done.stdout + done.stderr
