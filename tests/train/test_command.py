"""The command as a user runs it: a signal to it stops and saves the run, the same command continues it."""

import os
import signal
import subprocess
import sys
import time

from lamella.config import change, dump
from lamella.train.metrics_file import read_metrics
from tests.corpus import tiny_run


def start(file, *words):
    argv = [sys.executable, "-m", "lamella", "train", str(file), "--nproc", "2", *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def test_stop_and_continue(corpus, tmp_path):
    config = tiny_run(corpus, tmp_path)
    config = change(config, train=config.train.model_dump(mode="json") | {"steps": 100_000})
    dump(config, tmp_path / "run.yaml")
    metrics = config.folder / "metrics.jsonl"
    with start(tmp_path / "run.yaml") as run:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(read_metrics(metrics)) > 2) and time.monotonic() < deadline:
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 75, err
    assert "parameters" in out
    assert "stopped at step" in err
    assert "the same command continues" in err
    done = len(read_metrics(metrics))
    with start(tmp_path / "run.yaml", f"train.steps={done + 2}") as run:
        out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert f"from step {done} of {done + 2}" in out
    assert [line["step"] for line in read_metrics(metrics)] == list(range(done + 2))
