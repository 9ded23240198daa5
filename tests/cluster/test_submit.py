"""What is submitted: the snapshot, the script, the words for sbatch; and that no name, path or value is ever code."""

import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from lamella.cluster import job, submit
from lamella.config import change, load_run
from lamella.errors import UserError
from tests.commands import call

RUN = Path("configs/run/quickstart.yaml").absolute()
WANTED = submit.Wanted(2, 4, 1, "gpu", "1-00:00:00")
TRAP = "lamella-was-here"
HOSTILE = [
    f"$(touch {TRAP})", f"`touch {TRAP}`", f"; touch {TRAP}", f"| touch {TRAP}", f"&& touch {TRAP}",
    f"'; touch {TRAP}; '",
    f'"; touch {TRAP}; "', f"\ntouch {TRAP}\n", f"\n#SBATCH --wrap='touch {TRAP}'", f"> {TRAP}", f"<(touch {TRAP})",
    f"${{IFS}}touch{TRAP}", "../../etc", "..", ".", "/etc/passwd", "-rf", "--wrap=true", "a b", "a\tb", "%j%x%%",
    "*", "~root", "?", "[a-z]", "{a,b}", "!!", "\\", "\0", "é\u202e", "#x",
]  # fmt: skip


def run_of(tmp_path, **changes):
    return change(load_run(RUN, ["name=one"]), runs=str(tmp_path / "runs"), **changes)


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_words_are_refused_or_quoted(word, tmp_path, monkeypatch):
    """As the run's name, the folder of runs, a partition, a time, a container: five places each."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name"):
        change(run_of(tmp_path), name=word)
    for keys in ({"partition": word}, {"time": word}):
        with pytest.raises(UserError):
            submit.Wanted(1, 1, 1, **{"partition": None, "time": None} | keys).check()
    wanted = submit.Wanted(1, 1, 1, None, None, container=word.replace("\0", ""))
    run = change(run_of(tmp_path), runs=str(tmp_path / word.strip("/.\0") / "runs"))
    text = submit.script(run, wanted, run.folder / "config.yaml")
    before, after = text.split("set -euo pipefail\n", 1)
    assert word.strip() not in before or len(word) < 3
    shown = after.split("[ $# -ge 1 ]")[0] + 'printf "%s\\0" "$1" "$LAMELLA_CONTAINER"\n'
    done = subprocess.run(["bash", "-c", shown], capture_output=True, cwd=tmp_path)
    found = done.stdout.decode().split("\0")
    assert found[0] == str(run.folder / "config.yaml")
    assert found[1] == word.replace("\0", "") or not word.replace("\0", "")
    assert not (tmp_path / TRAP).exists()
    for option in submit.sbatch_words(run, wanted):
        assert option.startswith("--") and "=" in option  # one word each: no shell, no second option


def test_the_snapshot_is_what_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMELLA_TEST_TOKEN", "secret-7f3a")
    run = run_of(tmp_path)
    script = submit.snapshot(run, WANTED)
    assert load_run(script.with_name("config.yaml")) == run
    assert (
        "commit " in script.with_name("code.txt").read_text()
        and "torch==" in script.with_name("packages.txt").read_text()
    )
    assert not any("secret-7f3a" in path.read_text() for path in script.parent.iterdir())
    again = submit.snapshot(change(run, train=run.train.model_dump(mode="json") | {"seed": 5}), WANTED)
    assert load_run(again.with_name("config.yaml")).train.seed == 5
    assert [path.name for path in run.folder.iterdir()] == ["submit"]
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--partition", "a;b"], "--partition 'a;b' is not the name of a partition"),
        (["--time", "tomorrow"], "--time 'tomorrow' is not like"),
        (["layout.tensor=3"], "does not divide"),
        (["train.stepz=3"], "train.stepz"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, capsys):
    assert call("submit", RUN, f"runs={tmp_path}", "--nodes", "2", "--gpus-per-node", "2", *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        submit.submit(run_of(tmp_path), WANTED, tmp_path / "job.sh")
    with pytest.raises(UserError, match="no Slurm job here"):
        job.Job(run_of(tmp_path), [], {})
    assert job.requeue("7") is False


ENVIRON = {
    "SLURM_JOB_ID": "71",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_NODELIST": "n[3-4]",
}


def test_what_starts_the_processes(tmp_path):
    one = job.Job(run_of(tmp_path), ["run.yaml", "a.b=c d"], ENVIRON)
    words = one.command(0)
    assert words[0] == "srun" and "--ntasks=8" in words and words[-3:] == ["train", "run.yaml", "a.b=c d"]
    torch = job.Job(run_of(tmp_path, cluster={"launcher": "torchrun"}), ["run.yaml"], ENVIRON)
    first, again = (shlex.join(torch.command(attempt)) for attempt in (0, 1))
    assert (
        "--ntasks=2 --ntasks-per-node=1" in first and "--nproc-per-node=4" in first and "--rdzv-endpoint=n3:" in first
    )
    assert first != again  # another port and name: what is left of the attempt before cannot join
    inside = job.Job(run_of(tmp_path), ["run.yaml"], ENVIRON | {"LAMELLA_CONTAINER": "a b.sqsh"})
    assert "--container-image=a b.sqsh" in inside.command(0)


def script(tmp_path, monkeypatch, text):
    """A command that stands for srun."""
    file = tmp_path / "bin" / "srun"
    file.parent.mkdir()
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")
    monkeypatch.setattr(signal, "signal", lambda *given: None)


@pytest.mark.parametrize("code, ends, begun", [(0, 0, 1), (2, 2, 1), (1, 1, 3), (70, 1, 3)])
def test_attempts_that_get_nowhere_are_counted(code, ends, begun, tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, f"exit {code}")
    run = run_of(tmp_path)
    assert job.Job(run, ["run.yaml"], ENVIRON).supervise() == ends
    assert sum(line["event"] == "began" for line in job.attempts(run.folder)) == begun


def test_attempts_that_get_further_are_not(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    folder = run.folder / "checkpoints"
    folder.mkdir(parents=True)
    script(
        tmp_path,
        monkeypatch,
        f"n=$(ls {folder} | wc -l); [ $n -lt 7 ] || exit 0; mkdir {folder}/step-0000000$((n + 1)); exit 1",
    )
    assert job.Job(run, ["run.yaml"], ENVIRON).supervise() == 0
    assert [line["code"] for line in job.attempts(run.folder) if line["event"] == "ended"] == [1] * 7 + [0]


def test_a_cut_off_line_of_attempts_is_left_out(tmp_path):
    (tmp_path / job.ATTEMPTS).write_text('{"event": "began"}\n{"event": "en')
    assert job.attempts(tmp_path) == [{"event": "began"}]
    assert job.attempts(tmp_path / "nothing") == []
