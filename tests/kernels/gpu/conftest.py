"""Triton kernels: compiled on CUDA where there is a GPU, else interpreted on CPU tensors."""

import numpy as np
import pytest
import torch

from lamella_kernels import forms
from tests.kernels import interpreter
from tests.kernels.gpu import building


@pytest.fixture(autouse=True)
def on_kernels():
    """Every operator in its gpu form; skipped where triton is not installed."""
    if not forms.HAS_TRITON:
        pytest.skip("triton is not installed: pip install triton")
    if not torch.cuda.is_available() and (reason := interpreter.install()):
        pytest.skip(reason)
    with forms.use("gpu"), np.errstate(over="ignore"):  # hardware goes to infinity without a word
        yield


@pytest.fixture
def fenced(monkeypatch):
    """What torch.empty gives is NaN, between fences that nobody may touch."""
    fences = building.Fences(torch.empty)
    monkeypatch.setattr(torch, "empty", fences.empty)
    yield fences
    fences.check()
