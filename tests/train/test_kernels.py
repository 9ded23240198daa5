"""`lamella kernels`: its mistakes, the tiles a run writes down, and which process of a machine warms up first."""

import json
import subprocess
import sys

import pytest
import torch

from lamella.train import kernels
from lamella_kernels import forms, tiles
from tests.commands import call

RUN = "configs/run/quickstart.yaml"
MISTAKES = {
    "no GPU": (["warm-up", RUN], "no GPU here"),
    "no GPU to tune on": (["tune", RUN, "--out", "none-yet.json"], "no GPU here"),
    "a table that is there": (["tune", RUN, "--out", "pyproject.toml"], "pyproject.toml is there already"),
    "no folder": (["tune", RUN, "--out", "/nowhere/tiles.json"], "a folder that is not there"),
    "no such run": (["warm-up", "nothing.yaml"], "nothing.yaml"),
    "no such architecture": (["report", "--arch", "91"], "--arch 91: there is 80, 90, 100"),
    "no such operator": (["report", "--op", "softmax"], "--op softmax: there is"),
}


@pytest.mark.parametrize("words, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(words, message, monkeypatch, capsys):
    if not forms.HAS_TRITON:
        message = "triton is not installed" if "GPU" in message else message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call("kernels", *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_run_writes_its_tiles_down_and_tells_of_others(tmp_path, monkeypatch, capsys):
    kernels.record_tiles(tmp_path)
    found = json.loads((tmp_path / kernels.FILE).read_text())
    assert found == {"architecture": tiles.architecture(), "tiles": dict(tiles.table())}
    kernels.record_tiles(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tiles, "table", lambda: {"swiglu": [{"SIZE": 64}]})
    kernels.record_tiles(tmp_path)
    assert "tiles have changed since this run began" in capsys.readouterr().err
    assert json.loads((tmp_path / kernels.FILE).read_text())["tiles"] == {"swiglu": [{"SIZE": 64}]}
    (tmp_path / kernels.FILE).write_text("{")  # cut off by a kill: written anew
    kernels.record_tiles(tmp_path)
    assert json.loads((tmp_path / kernels.FILE).read_text())["architecture"] == tiles.architecture()


WARM = """
import sys, time
from pathlib import Path
from lamella.train.rehearse import _first
print("ready", flush=True)
sys.stdin.readline()
with _first():
    begin = time.monotonic()
    time.sleep(0.5)
    print(begin, time.monotonic(), flush=True)
"""


def test_one_process_of_a_machine_goes_first(tmp_path):
    """Of four that come together one is alone."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )
        for _ in range(4)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    first, *others = sorted(tuple(map(float, p.communicate(timeout=60)[0].split())) for p in started)
    assert all(begin >= first[1] for begin, _ in others)
