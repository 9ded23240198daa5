"""The house keeps its rules: floors, lint, types; help and mistakes answer at once, without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
COMMANDS = {
    "lint": [BIN / "ruff", "check", "."],
    "types": [BIN / "pyright", "--pythonpath", sys.executable],
    "floors": [BIN / "lint-imports", "--no-cache"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_checks(name):
    done = subprocess.run(COMMANDS[name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mathematics_never_communicates():
    floors = [f for room in ("nn", "mixers", "channels", "model") for f in (ROOT / "src/lamella" / room).rglob("*.py")]
    assert len(floors) > 20
    assert [f for f in floors if "torch.distributed" in re.sub(r'""".*?"""', "", f.read_text(), flags=re.S)] == []


QUICK = [
    (["--help"], 0, "Usage"),
    (["train", "--help"], 0, "RUN.yaml"),
    (["verify", "--help"], 0, "RUN.yaml"),
    (["data", "prepare", "--help"], 0, "FILE"),
    (["data", "inspect", "--help"], 0, "--measure"),
    (["data", "inspect", "configs/data/stdlib.yaml", "path=nowhere"], 2, "no prepared data here"),
    (["convert", "--help"], 0, "SOURCE"),
    (["convert", "nowhere", "there", "--to", "hf"], 2, "no such folder"),
    (["train", "configs/run/quikstart.yaml"], 2, "did you mean"),
    (["train", "configs/run/quickstart.yaml", "train.stpes=1"], 2, "train.steps"),
    (["train", "configs/run/quickstart.yaml", "model=jambo"], 2, "jamba-nano"),
    (["verify", "configs/run/quickstart.yaml", "--layout", "tenser=2"], 2, "did you mean tensor"),
    (["data", "prepare", "configs/data/stdlib.yaml", "heldout=7"], 2, "heldout"),
]


@pytest.mark.parametrize(("words", "code", "text"), QUICK, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_help_and_mistakes_do_not_import_torch(words, code, text):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lamella", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert done.returncode == code, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert text in done.stdout + "\n".join(said)
    if code == 2:
        assert len(said) == 1, said
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "lamella.cli.main" in imported
    assert not imported & {"torch", "datasets", "deepspeed", "megatron"}
