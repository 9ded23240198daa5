"""flash-linear-attention as a peer: its kernels, interpreted where there is no GPU for them."""

import importlib.util
import warnings

import pytest

from tests.kernels import interpreter


def imported(name: str):
    """A module of fla. Skips the test with the reason, where it cannot be."""
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    if reason := interpreter.install():
        pytest.skip(f"fla's kernels cannot be interpreted: {reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of what is not installed
        return importlib.import_module(name)
