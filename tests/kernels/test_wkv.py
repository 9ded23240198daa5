"""What both RWKV recurrences must do beside `test_recurrences.py`: any chunk, decays at their ends, extremes, cost."""

import math

import pytest
import torch

from lamella_kernels.wkv6 import eager as wkv6_eager
from lamella_kernels.wkv7 import eager as wkv7_eager
from tests.kernels import test_wkv6, test_wkv7
from tests.kernels.building import (
    FIVE,
    assert_agree,
    assert_close,
    assert_exact,
    assert_finite,
    assert_gradients,
    cost,
    resets,
    values_and_gradients,
    wide_copy,
)

EAGER = {test_wkv6: wkv6_eager, test_wkv7: wkv7_eager}
pytestmark = pytest.mark.parametrize("op", list(EAGER), ids=["wkv6", "wkv7"])


@pytest.mark.parametrize("chunk", [1, 2, 8, 16, 128])
def test_every_chunk_size_equals_reference(op, monkeypatch, chunk):
    """Also with documents that start exactly where chunks do."""
    monkeypatch.setattr(EAGER[op], "CHUNK", chunk)
    inputs = op.make(45)
    for reset in (None, resets(45), (torch.arange(45) % chunk == 0).expand(2, 45)):
        assert_agree(op.run, op.run_reference, inputs, reset, limit=1e-13)


@pytest.mark.parametrize("chunk", [2, 32])
def test_gradcheck(op, monkeypatch, chunk):
    monkeypatch.setattr(EAGER[op], "CHUNK", chunk)
    inputs = op.make(5, heads=1, keys=2, values=2)
    with torch.no_grad():
        inputs["log_w"].clamp_(min=-3)
    assert_gradients(op.run, inputs, FIVE)


@pytest.mark.parametrize("log_w", [0.0, -1e-8, -1e-3, -5.0, -80.0, -1e5, -math.inf], ids=str)
@pytest.mark.parametrize("time", [1, 100])
def test_decays_at_their_ends(op, time, log_w):
    """All decays the same, from 1 to 0: finite, and as near to fp64 as anywhere."""
    inputs = op.make(time, dtype=torch.float32)
    with torch.no_grad():
        inputs["log_w"].fill_(log_w)
    ours = values_and_gradients(op.run, inputs, resets(time))
    assert_finite(ours)
    theirs = values_and_gradients(op.run_reference, wide_copy(inputs), resets(time))
    if log_w == -math.inf:
        theirs["log_w"] = torch.zeros_like(theirs["log_w"])  # autograd has 0 * inf there
    assert_close(ours, theirs, 5e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e8], ids=str)
def test_huge_and_tiny_inputs(op, scale):
    inputs = op.make(130, dtype=torch.float32)
    with torch.no_grad():
        for name in ("r", "k", "v"):
            inputs[name].mul_(scale)
        inputs["initial"].mul_(scale**2)
    assert_exact(op.run, op.run_reference, inputs, resets(130), limit=5e-6)


def test_a_long_row(op):
    """Of one document, judged by the op itself in fp64."""
    inputs = op.make(4096, batch=1, heads=1, dtype=torch.float32)
    assert_exact(op.run, op.run, inputs, torch.zeros(1, 4096, dtype=torch.bool), limit=5e-6)


def test_calls_grow_by_chunks_alone(op):
    """A few calls for each chunk of the longer row, and no tensor that is more than linear in time."""
    chunks = (2048 - 256) // EAGER[op].CHUNK
    sizes = {"batch": 1, "heads": 2, "keys": 16, "values": 16, "dtype": torch.float32, "initial": False}
    for short, long in zip(*(cost(op.run, op.make(time, **sizes)) for time in (256, 2048)), strict=True):
        assert long.count - short.count <= 8 * chunks
        assert long.elements <= 8.1 * short.elements
