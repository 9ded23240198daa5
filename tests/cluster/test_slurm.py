"""Runs on a real Slurm cluster, disturbed: they end as the run that nothing disturbed, bit for bit."""

import os
import signal
import subprocess

import pytest

from lamella.cluster.job import attempts
from lamella.errors import EXIT_HUNG
from tests.commands import call

FULL = pytest.mark.full
LAUNCHERS = ["srun", pytest.param("torchrun", marks=FULL)]


def events(submitted):
    return [line["event"] for line in attempts(submitted.folder)]


@FULL
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_two_nodes_of_two(submit, launcher):
    run = submit(f"cluster.launcher={launcher}")
    run.finish()
    run.assert_as_if_nothing_had_happened()
    assert events(run) == ["began", "ended"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_near_its_time_limit_a_job_saves_and_is_requeued(submit, launcher):
    """Slurm's own USR1, sent by hand: a limit counts in minutes."""
    run = submit(f"cluster.launcher={launcher}")
    run.reach(30)
    subprocess.run(["scancel", "--batch", "--signal=USR1", run.job], check=True)
    run.finish()
    run.assert_as_if_nothing_had_happened()
    first, second = (line for line in attempts(run.folder) if line["event"] == "ended")
    assert (first["code"], first["why"], first["restart"], second["restart"]) == (75, "requeue", 0, 1)
    assert 30 < first["step"] < 120  # saved where it stopped, not at the checkpoint before


@pytest.mark.parametrize(
    "launcher, rank",
    [("torchrun", 0), pytest.param("torchrun", 3, marks=FULL), *(pytest.param("srun", r, marks=FULL) for r in (0, 3))],
)
def test_a_killed_rank(submit, launcher, rank):
    run = submit(f"cluster.launcher={launcher}")
    run.reach(25)
    os.kill(run.cluster.ranks(run.job)[rank], signal.SIGKILL)
    run.finish()
    run.assert_as_if_nothing_had_happened()
    assert events(run) == ["began", "ended"] * 2


@FULL
def test_a_rank_that_hangs(submit):
    """It is stopped, the others wait for it: they write down where, and the job starts them all again."""
    run = submit("train.hang={times: 2, at_least: 15}")
    run.reach(25)
    os.kill(run.cluster.ranks(run.job)[1], signal.SIGSTOP)
    run.finish()
    run.assert_as_if_nothing_had_happened()
    stacks = {path.name for path in (run.folder / "stacks").iterdir()}
    assert "rank-1.txt" not in stacks and {"rank-0.txt", "rank-2.txt"} <= stacks
    assert "train_step" in (run.folder / "stacks/rank-0.txt").read_text()
    assert attempts(run.folder)[1]["code"] in (EXIT_HUNG, 128 + signal.SIGKILL)  # srun tells the largest


@FULL
def test_a_node_that_crashes(submit, cluster):
    run = submit()
    run.reach(25)
    node = attempts(run.folder)[0]["nodes"].replace("[", "").split("-")[0].split(",")[0]
    cluster.call("fail", node, "crash")
    try:
        run.until(lambda: events(run).count("began") == 2, "begin anew", 120)
        run.finish()
    finally:
        cluster.call("recover", node)
    run.assert_as_if_nothing_had_happened()
    assert node not in attempts(run.folder)[-1]["nodes"]


@FULL
def test_stop_saves_and_ends_and_submit_continues(submit, capsys):
    run = submit()
    run.reach(20)
    assert call("stop", run.folder / "submit/config.yaml") == 0
    assert f"job {run.job} saves and ends" in capsys.readouterr().out
    run.finish()
    assert attempts(run.folder)[-1]["why"] == "stop" and 20 < attempts(run.folder)[-1]["step"] < 120
    assert call("status", run.folder / "submit/config.yaml") == 0
    assert " of 120, loss " in capsys.readouterr().out
    run.submit()
    run.finish()
    run.assert_as_if_nothing_had_happened()


@FULL
def test_a_chain_and_a_neighbour_on_the_same_nodes(submit):
    """Two jobs of a chain, the second finds all done; beside it another run."""
    one, other = submit(name="-a"), submit(name="-b")
    one.submit("--chain", "2")
    for run in (one, other):
        run.finish()
        run.assert_as_if_nothing_had_happened()
