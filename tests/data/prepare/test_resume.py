"""A preparing that is ended at any moment completes on the next call, to the bytes of one that was not."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamella.config import SourceConfig, change, dump
from lamella.data.prepare import journal, workers, write
from lamella.data.prepare.prepare import prepare
from lamella.data.sources import files
from lamella.data.store.tokens import TokenWriter
from lamella.errors import UserError

RUN = """
import sys
from lamella.config import load_data
from lamella.data.prepare import workers, write
from lamella.data.prepare.prepare import prepare
from lamella.data.sources import files
write.EVERY, write.TASK, workers.ALONE, files.TOGETHER = 0.0, 3000, 20000, 1
def listener(report):
    print(report.phase, report.bytes, flush=True)
    if len(sys.argv) > 3 and report.phase == sys.argv[3] and report.bytes >= int(sys.argv[4]):
        input()
prepare(load_data(sys.argv[1]), listener, force="--force" in sys.argv, processes=int(sys.argv[2]))
"""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def leftover(target: Path) -> Path:
    return target.with_name(f".{target.name}.preparing")


@pytest.fixture
def two(make, corpus, tmp_path):
    """A configuration of two sources with duplicates dropped, and what its folder holds when nothing comes between."""
    texts = SourceConfig(format="text", path=str(corpus))
    more = SourceConfig(format="text", path=str(corpus / "0*[02468].py"), name="more")
    config = make(corpus, tmp_path / "out", sources=(texts, more), duplicates="drop")
    prepare(config, processes=1)
    whole = snapshot(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "reference")
    dump(config, tmp_path / "data.yaml")
    return config, whole


def small_steps(monkeypatch) -> None:
    for module, name, value in ((write, "EVERY", 0.0), (write, "TASK", 2000), (files, "TOGETHER", 1)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(workers, "ALONE", 9000)


def start(tmp_path: Path, *words: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", RUN, str(tmp_path / "data.yaml"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def kill_at(tmp_path: Path, processes: int, phase: str, size: int, *words: str) -> None:
    with start(tmp_path, processes, phase, size, *words) as child:
        assert child.stdout
        for line in child.stdout:
            if line.rsplit(" ", 1)[0] == phase and int(line.split()[-1]) >= size:
                break
        else:
            raise AssertionError("it ended before")
        child.send_signal(signal.SIGKILL)


def test_the_same_bytes_for_any_number_of_processes(two, tmp_path, monkeypatch):
    config, whole = two
    small_steps(monkeypatch)
    for processes in (1, 3):
        assert not prepare(config, processes=processes).resumed
        assert snapshot(tmp_path / "out") == whole
        assert not leftover(tmp_path / "out").exists()
        (tmp_path / "out").rename(tmp_path / f"out{processes}")


@pytest.mark.parametrize(
    ("phase", "size", "processes"), [("training the tokenizer", 0, 1), ("encoding", 25_000, 2), ("encoding", 5_000, 1)]
)
def test_killed_at_a_place(two, tmp_path, phase, size, processes):
    config, whole = two
    kill_at(tmp_path, processes, phase, size)
    target = tmp_path / "out"
    assert not target.exists() and leftover(target).is_dir()
    summary = prepare(config)
    assert summary.resumed == (phase == "encoding")
    assert snapshot(target) == whole and not leftover(target).exists()


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 20))])
def test_killed_at_random_moments(two, tmp_path, seed):
    """Twice, each some milliseconds behind a random line that it prints."""
    config, whole = two
    rng = random.Random(seed)
    target = tmp_path / "out"
    for _ in range(2):
        phase = rng.choice(["reading", "training the tokenizer", *["encoding"] * 6, "writing the manifest"])
        size = rng.randrange(30_000) if phase == "encoding" else 0
        with start(tmp_path, rng.choice([1, 2])) as child:
            assert child.stdout
            for line in child.stdout:
                if line.rsplit(" ", 1)[0] == phase and int(line.split()[-1]) >= size:
                    break
            time.sleep(rng.random() * 0.03)
            child.send_signal(signal.SIGKILL)
        if target.exists():  # it was faster, or a kill fell behind the renaming
            assert snapshot(target) == whole
    prepare(config)
    assert snapshot(target) == whole and not leftover(target).exists()


def test_children_end_with_a_killed_parent(two, tmp_path):
    with start(tmp_path, 2, "encoding", 20_000) as child:
        assert child.stdout
        for line in child.stdout:
            if line.startswith("encoding") and int(line.split()[-1]) >= 20_000:
                break
        threads = Path(f"/proc/{child.pid}/task").glob("*/children")
        children = [int(pid) for thread in threads for pid in thread.read_text().split()]
        child.send_signal(signal.SIGKILL)
    assert children
    end = time.monotonic() + 30
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[:1]
    except OSError:
        return False


def test_a_replacement_leaves_the_old_one_whole_and_two_keep_apart(two, tmp_path):
    config, whole = two
    target = tmp_path / "out"
    prepare(config)
    (tmp_path / "data.yaml").unlink()
    other = change(config, heldout=0.3)
    dump(other, tmp_path / "data.yaml")
    with start(tmp_path, 1, "encoding", 1000, "--force") as child:
        assert child.stdout
        next(line for line in child.stdout if line.startswith("encoding") and int(line.split()[-1]) >= 1000)
        assert prepare(config).already  # who only looks is not in the way
        with pytest.raises(UserError, match=rf"out: being prepared by another process \({child.pid} on .*wait for it"):
            prepare(other, force=True)
        child.send_signal(signal.SIGKILL)
    assert snapshot(target) == whole
    assert prepare(config).already and leftover(target).exists()  # somebody else's work
    assert prepare(other, force=True).resumed
    assert not leftover(target).exists() and prepare(other).already


def test_killed_between_the_two_renamings(two, tmp_path):
    config, whole = two
    target = tmp_path / "out"
    prepare(config)
    kill_at(tmp_path, 1, "encoding", 1000, "--force")
    target.rename(leftover(target) / "old")
    summary = prepare(config, force=True)
    assert summary.resumed and snapshot(target) == whole and not leftover(target).exists()


FULL = [pytest.param(what, marks=pytest.mark.full) for what in ("version", "journal", "tokenizer")]


@pytest.mark.parametrize("what", ["configuration", "sources", "truncated file", *FULL])
def test_another_journal_is_thrown_away(two, tmp_path, what, monkeypatch):
    config, whole = two
    kill_at(tmp_path, 1, "encoding", 30_000)
    work = leftover(tmp_path / "out")
    match what:
        case "configuration":
            config = change(config, heldout=0.3)
        case "sources":
            for file in Path(config.sources[0].path or "").glob("000*"):
                os.utime(file)
        case "version":
            monkeypatch.setattr(journal, "FORMAT", 2)
        case "truncated file":
            os.truncate(work / "out" / "texts" / "train.bin", 10)
        case "journal":
            (work / "journal.json").write_text("{")
        case "tokenizer":
            (work / "out" / "tokenizer.model").unlink()
    assert not prepare(config).resumed
    now = snapshot(tmp_path / "out")
    kept = {name for name in now if what != "configuration" and name != "manifest.json"}
    assert {name: now[name] for name in kept} == {name: whole[name] for name in kept}


def test_a_full_disk(two, tmp_path, monkeypatch):
    config, whole = two
    small_steps(monkeypatch)
    real = TokenWriter.extend
    calls = iter(range(100))

    def full(self, *arguments):
        if next(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, *arguments)

    monkeypatch.setattr(TokenWriter, "extend", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device.; make room.*the same command"):
        prepare(config)
    monkeypatch.setattr(TokenWriter, "extend", real)
    assert not (tmp_path / "out").exists()
    assert prepare(config).resumed and snapshot(tmp_path / "out") == whole
