"""What the compiler makes of the kernels at their tiles: no spill, blocks that fit, tensor cores in products."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lamella_kernels
from lamella_kernels import forms, tiles

pytestmark = pytest.mark.skipif(not forms.HAS_TRITON, reason="triton is not installed: pip install triton")


def report(*words):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lamella_kernels.report", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr[-2000:]
    return done.returncode, rows


def operators():
    folder = Path(lamella_kernels.__file__).parent
    return sorted(file.parent.name for file in folder.glob("*/gpu.py"))


def test_a_kernel_of_the_report():
    code, rows = report("--arch", "90", "--op", "swiglu")
    assert {row["kernel"] for row in rows} == {"_forward", "_backward"}
    assert all(row["registers"] > 8 and row["instructions"] > 20 for row in rows)
    assert (code, [row for row in rows if row["fault"]]) == (0, [])


@pytest.mark.full
@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
@pytest.mark.parametrize("op", operators())
def test_every_kernel(op, arch):
    code, rows = report("--arch", str(arch), "--op", op)
    assert {row["arch"] for row in rows} == {arch}
    assert (code, [row for row in rows if row["fault"]]) == (0, [])
