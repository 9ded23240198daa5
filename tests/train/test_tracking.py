"""MLflow is told every step once, whatever dies on the way, and training never waits for it.

The test process plays the trainer: it writes a metrics file, starts the tracker and closes it. What MLflow holds is
read from its database.
"""

import contextlib
import json
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lamella.config import DataConfig, change, dump
from lamella.parallel.local import free_port
from lamella.train.metrics_file import MetricsFile
from lamella.train.mlflow_store import scalars
from lamella.train.note import Note
from lamella.train.tracking import Tracker
from tests.corpus import tiny_run

DATA = DataConfig.model_validate({"path": "nowhere", "sources": [{"format": "stdlib"}]}, strict=False)


def make_run(runs: Path, name="tiny", steps=6, **tracking):
    """A run's folder, as the trainer leaves it before its first step."""
    config = tiny_run(DATA, runs, name=name)
    train = config.train.model_dump(mode="json") | {"steps": steps}
    config = change(config, train=train, tracking={"enabled": True, **tracking})
    config.folder.mkdir(parents=True)
    dump(config, config.folder / "config.yaml")
    return config


def line(step):
    """What a step logs."""
    values = {"step": step, "loss": 8 / (step + 1), "grad_norm": 0.5 + step, "lr": 1e-3, "tokens": 512}
    values |= {"tokens_per_second": 5120.0, "seconds": {"forward": 0.04, "backward": 0.06}}
    values["moe"] = {"layer0/channel": {"load": [0.1, 0.6, 0.3], "dropped": 0.0, "entropy": 1.0 + step}}
    return values | ({"heldout_loss": 6 / (step + 1)} if step % 3 == 2 else {})


def write(config, first, last, lines=line):
    """Logs steps `first` to `last` - 1, after forgetting what was logged from `first` on."""
    file = MetricsFile(config.folder / "metrics.jsonl", first)
    for step in range(first, last):
        file.write(lines(step))
    file.file.close()


def query(database, words, *values):
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute(words, values).fetchall()


def runs_in(database):
    """{name: [(run, status)]} of the MLflow runs."""
    found = {}
    for name, run, status in query(database, "select name, run_uuid, status from runs order by start_time"):
        found.setdefault(name, []).append((run, status))
    return found


def assert_complete(database, run, steps, lines=line):
    """Every number of every step is there, once."""
    words = "select key, step, value, is_nan from metrics where run_uuid = ? and key not like 'system/%'"
    got = sorted((k, s, math.nan if n else v) for k, s, v, n in query(database, words, run))
    want = sorted((k, s, v) for s in range(steps) for k, v in scalars(lines(s)))
    assert [x[:2] for x in got] == [x[:2] for x in want]
    assert [x[2] for x in got] == pytest.approx([x[2] for x in want], nan_ok=True)


def the_run(database, status):
    """The id of the one MLflow run there, which has the status."""
    ((run, found),) = next(iter(runs_in(database).values()))
    assert found == status
    return run


def wait_for(what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def noted(config):
    """The step that each store takes next."""
    file = config.folder / "tracking.json"
    return [note["next"] for note in json.loads(file.read_text()).values()] if file.exists() else []


def lamella(*words, **environment):
    argv = [sys.executable, "-m", "lamella", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.fixture
def broken_mlflow(tmp_path):
    """A PYTHONPATH on which mlflow cannot be imported."""
    (tmp_path / "broken" / "mlflow").mkdir(parents=True)
    (tmp_path / "broken" / "mlflow" / "__init__.py").write_text("raise ImportError('not today')\n")
    return str(tmp_path / "broken")


def test_a_run_and_its_continuation_in_the_default_store(tmp_path, capfd):
    def lines(step):
        return line(step) | ({"loss": math.nan} if step == 2 else {})

    config = make_run(tmp_path / "the runs")  # a space in the path
    database = tmp_path / "the runs" / "mlflow.db"
    write(config, 0, 0)
    tracker = Tracker(config, 0, flush_seconds=30)
    write(config, 0, 4, lines)
    tracker.close(stopped=True)
    run = the_run(database, "KILLED")
    assert_complete(database, run, 4, lines)

    # continued from an earlier checkpoint, with more steps to go
    longer = change(config, train=config.train.model_dump(mode="json") | {"steps": 8})
    dump(longer, config.folder / "config.yaml")
    write(longer, 2, 2)
    tracker = Tracker(longer, 2, flush_seconds=30)
    write(longer, 2, 8, lines)
    (config.folder / "figures").mkdir()
    (config.folder / "figures" / "loss.png").write_bytes(b"a picture")
    tracker.close(stopped=False)
    assert the_run(database, "FINISHED") == run
    assert_complete(database, run, 8, lines)

    parameters = dict(query(database, "select key, value from params where run_uuid = ?", run))
    assert parameters["model.parts.mamba.d_state"] == "4"
    assert parameters["model.stack.0.layers"] == '["mamba/moe", "attention/mlp"]'
    assert parameters["train.steps"] == "6"
    tags = dict(query(database, "select key, value from tags where run_uuid = ?", run))
    assert tags["now.train.steps"] == "8"
    assert tags["lamella.host"] == socket.gethostname()
    assert re.fullmatch("[0-9a-f]{40}", tags["mlflow.source.git.commit"])
    files = tmp_path / "the runs" / "mlartifacts" / run / "artifacts"
    assert (files / "figures" / "loss.png").read_bytes() == b"a picture"
    assert (files / "config.yaml").read_text() == (config.folder / "config.yaml").read_text()
    out = capfd.readouterr()
    assert out.out + out.err == ""  # MLflow's chatter stays out of the training log


def test_what_goes_on_in_the_same_mlflow_run(tmp_path):
    config = make_run(tmp_path / "runs")
    note = Note.load(config.folder, config, "sqlite:///a.db")
    note.save(config.folder)
    other = change(config, train=config.train.model_dump(mode="json") | {"seed": 8})
    renamed = change(config, name="copied")

    def key(config, uri="sqlite:///a.db", start=None):
        return Note.load(tmp_path / "runs" / "tiny", config, uri, start).key

    assert key(config, start=0) == key(config, start=2) == key(config) == note.key
    assert key(other, start=2) == note.key
    assert key(other, start=0) != note.key  # begun anew with another configuration
    assert key(renamed, start=2) != note.key  # the folder was copied
    assert key(config, "sqlite:///b.db") != note.key


def test_four_at_once_on_a_fresh_database(tmp_path):
    configs = [make_run(tmp_path / "runs", f"run{n}") for n in range(4)]
    for config in configs:
        write(config, 0, 6)
    for tracker in [Tracker(config, 1, flush_seconds=60) for config in configs]:
        tracker.close(stopped=False)
    runs = runs_in(tmp_path / "runs" / "mlflow.db")
    assert sorted(runs) == ["run0", "run1", "run2", "run3"]
    for ((run, status),) in runs.values():
        assert status == "FINISHED"
        assert_complete(tmp_path / "runs" / "mlflow.db", run, 6)


DIE = """
import os, sys
from pathlib import Path
from lamella.train import mlflow_store, tracking

def dying(right):
    def call(*args, **kwargs):
        right(*args, **kwargs)
        os._exit(9)
    return call

from mlflow import MlflowClient
MlflowClient.{call} = dying(MlflowClient.{call})
tracking.replay(Path(sys.argv[1]), None, False)
"""


@pytest.mark.parametrize(
    "call",
    [
        "log_batch",
        pytest.param("create_run", marks=pytest.mark.full),
        pytest.param("set_terminated", marks=pytest.mark.full),
    ],
)
def test_killed_between_a_send_and_its_note(call, tmp_path):
    config = make_run(tmp_path / "runs")
    write(config, 0, 6)
    died = subprocess.run([sys.executable, "-W", "ignore", "-c", DIE.format(call=call), str(config.folder)])
    assert died.returncode == 9
    done = lamella("track", config.folder)
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "runs" / "mlflow.db", the_run(tmp_path / "runs" / "mlflow.db", "FINISHED"), 6)


TRAINER = """
import sys, time
from pathlib import Path
from lamella.config import load_run
from lamella.train.tracking import Tracker
tracker = Tracker(load_run(Path(sys.argv[1]) / "config.yaml"), 0)
print(tracker.child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_a_killed_trainer_leaves_no_tracker(tmp_path):
    config = make_run(tmp_path / "runs")
    write(config, 0, 3)
    with subprocess.Popen([sys.executable, "-c", TRAINER, config.folder], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        tracker = int(trainer.stdout.readline())
        wait_for(lambda: noted(config) == [3])
        write(config, 3, 5)
        os.kill(tracker, signal.SIGINT)  # meant for the trainer, as Slurm and terminals send it
        os.kill(tracker, signal.SIGTERM)
        trainer.kill()
    wait_for(lambda: not is_running(tracker))
    database = tmp_path / "runs" / "mlflow.db"
    assert_complete(database, the_run(database, "FAILED"), 5)


class Server:
    """An MLflow server on loopback, over a database."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri, self.database = f"http://127.0.0.1:{self.port}", folder / "server.db"

    def start(self):
        argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        argv += ["--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self.folder)]
        argv += ["--workers", "1"]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            argv, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self.answers)

    def answers(self):
        assert self.process is not None and self.process.poll() is None
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
            return answer.status == 200
        return False

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its workers
            self.process.wait()
        self.process = None


@pytest.fixture
def server(tmp_path):
    found = Server(tmp_path)
    yield found
    found.kill()


def test_a_server_killed_and_started_again(server, tmp_path, capfd):
    server.start()
    config = make_run(tmp_path / "runs", steps=60, uri=server.uri)
    write(config, 0, 0)
    tracker = Tracker(config, 0, flush_seconds=40)
    file = MetricsFile(config.folder / "metrics.jsonl", 0)
    for step in range(60):
        if step == 20:
            wait_for(lambda: noted(config) and noted(config)[0] > 5)
            server.kill()
        if step == 40:
            server.start()
        file.write(line(step))
        time.sleep(0.03)
    file.file.close()
    tracker.close(stopped=False)
    assert_complete(server.database, the_run(server.database, "FINISHED"), 60)
    said = capfd.readouterr().err.splitlines()
    assert len(said) <= 1, said
    assert (server.folder / "1" / the_run(server.database, "FINISHED") / "artifacts" / "config.yaml").exists()


def test_a_server_that_never_answers_stops_nothing(tmp_path, capfd):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        config = make_run(tmp_path / "runs", uri=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        write(config, 0, 0)
        tracker = Tracker(config, 0, flush_seconds=2)
        taken, _ = deaf.accept()  # the request hangs
        began = time.monotonic()
        write(config, 0, 6)
        assert time.monotonic() - began < 1
        tracker.close(stopped=False)
        assert time.monotonic() - began < 2 + 2 + 1
        taken.close()
    assert tracker.child is not None and tracker.child.returncode is not None
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert "has not got steps 0 to 5" in said[0]
    assert f"lamella track {config.folder}" in said[0]


def test_a_run_without_mlflow(corpus, tmp_path, broken_mlflow):
    config = change(tiny_run(corpus, tmp_path / "runs"), tracking={"enabled": True})
    dump(config, tmp_path / "run.yaml")
    done = lamella("train", tmp_path / "run.yaml", "--nproc", 1, PYTHONPATH=broken_mlflow)
    assert done.returncode == 0, done.stderr
    (said,) = [text for text in done.stderr.splitlines() if "mlflow" in text.lower()]
    assert "not today" in said and "lamella track" in said
    assert len((config.folder / "metrics.jsonl").read_text().splitlines()) == 6


def test_replay(tmp_path):
    config = make_run(tmp_path / "runs")
    write(config, 0, 4)
    with (config.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    done = lamella("track", config.folder, "--uri", f"sqlite:///{tmp_path}/other.db")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/other.db'" in done.stdout
    assert_complete(tmp_path / "other.db", the_run(tmp_path / "other.db", "KILLED"), 4)

    write(config, 4, 6)
    done = lamella("track", config.folder, "--follow")  # ends by itself: the last step is there
    assert (done.returncode, done.stderr) == (0, "")
    assert_complete(tmp_path / "runs/mlflow.db", the_run(tmp_path / "runs/mlflow.db", "FINISHED"), 6)


def test_mistakes(tmp_path, broken_mlflow):
    config = make_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    write(config, 0, 3)
    folder, metrics = config.folder, config.folder / "metrics.jsonl"
    cases = [
        ((tmp_path / "empty",), "holds no run"),
        ((tmp_path / "nowhere",), "holds no run"),
        ((folder, "--uri", "localhost"), "http://HOST:PORT"),
        ((folder,), "not today"),
    ]
    for words, said in cases:
        done = lamella("track", *words, PYTHONPATH=broken_mlflow)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert said in done.stderr
    metrics.write_text(metrics.read_text().replace("loss", '"', 1))
    damaged = lamella("track", folder)
    assert (damaged.returncode, len(damaged.stderr.splitlines())) == (2, 1), damaged.stderr
    assert f"{metrics}: a line is damaged" in damaged.stderr
    nobody = lamella("track", folder, "--uri", f"http://127.0.0.1:{free_port()}")
    assert (nobody.returncode, len(nobody.stderr.splitlines())) == (2, 1), nobody.stderr


@pytest.mark.parametrize("words", [["track", "--help"], ["track", "nowhere"]], ids=" ".join)
def test_help_and_mistakes_answer_at_once(words):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "lamella", *words], capture_output=True, text=True)
    imported = {text.split("|")[-1].strip() for text in done.stderr.splitlines() if text.startswith("import time:")}
    assert "lamella.cli.track" in imported
    assert not imported & {"torch", "mlflow", "megatron"}
