"""The Triton norm against the equation: every kind, values and gradients."""

import pytest
import torch

from lamella_kernels.rmsnorm import reference, rmsnorm
from tests.kernels.gpu.building import LIMITS, assert_compiles, assert_exact, assert_operator, numbers

EPS = 1e-5
KINDS = ["plain", "no weight", "residual", "gate first", "gate last"]


def make(kind, time, channels, dtype=torch.float32, weight=torch.float32):
    normal = numbers(dtype)
    inputs = {"x": normal(2, time, channels)}
    if kind != "no weight":
        inputs["weight"] = numbers(weight, seed=1)(channels)
    if kind not in ("plain", "no weight"):
        inputs["residual" if kind == "residual" else "gate"] = normal(2, time, channels)
    return inputs


def ours(kind, width=None):
    def run(inputs):
        other = {name: inputs[name] for name in ("residual", "gate") if name in inputs}
        first = kind == "gate first"
        return rmsnorm(inputs["x"], inputs.get("weight"), eps=EPS, width=width, gate_first=first, **other)

    return run


def theirs(kind, width=None):
    def run(inputs):
        x, weight, w = inputs["x"], inputs.get("weight"), width or inputs["x"].shape[-1]
        if kind == "residual":
            return reference.add_rmsnorm(x, inputs["residual"], weight, w, EPS)
        return reference.rmsnorm(x, inputs.get("gate"), weight, w, EPS, kind == "gate first")

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_equals_reference(kind, fenced):
    inputs = make(kind, 63, 48)
    assert_exact(ours(kind), theirs(kind), inputs, LIMITS[torch.float32])
    assert_exact(ours(kind, 16), theirs(kind, 16), inputs, LIMITS[torch.float32])


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("time", "channels", "width"),
    [(1, 5, 5), (100, 5, 5), (257, 33, 11), (100, 300, 300), (1, 2050, 2050), (63, 2304, 768), (3, 4100, 4100)],
)
def test_lengths_widths_and_types(kind, dtype, time, channels, width, fenced):
    inputs = make(kind, time, channels, dtype, torch.float32 if width == 11 else dtype)
    assert_exact(ours(kind, width), theirs(kind, width), inputs, LIMITS[dtype])


@pytest.mark.parametrize("kind", ["gate first", "residual"])
def test_bfloat16(kind, fenced):
    inputs = make(kind, 63, 48, torch.bfloat16)
    found = assert_exact(ours(kind, 16), theirs(kind, 16), inputs, LIMITS[torch.bfloat16])
    assert {name: found[name].dtype for name in inputs} == {name: value.dtype for name, value in inputs.items()}


def test_rows_that_are_apart():
    """A slice of a fused projection and an expanded gradient are read where they lie."""
    whole = numbers(torch.float32)(2, 21, 96)
    inputs = {"x": whole, "weight": numbers(torch.float32, 1)(32)}

    def both(form):
        def run(inputs):
            parts = dict(zip(("x", "gate"), inputs["x"][..., 32:].split(32, -1), strict=True))
            return form("gate first")({**parts, "weight": inputs["weight"]}).sum(-1, keepdim=True).expand(2, 21, 3)

        return run

    assert_exact(both(ours), both(theirs), inputs, LIMITS[torch.float32])


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_outputs(index):
    """y or the sum alone takes part in the loss."""
    inputs = make("residual", 7, 32)
    if index == 1:
        inputs["weight"].requires_grad_(False)
    run, judge = (lambda given, form=form: form("residual")(given)[index] for form in (ours, theirs))
    assert_exact(run, judge, inputs, LIMITS[torch.float32])


def test_frozen_arguments():
    inputs = make("gate first", 7, 32)
    for name in inputs:
        given = {k: v.detach().requires_grad_(k == name) for k, v in inputs.items()}
        assert_exact(ours("gate first"), theirs("gate first"), given, LIMITS[torch.float32])


def test_no_rows():
    assert ours("plain")({"x": torch.empty(0, 8), "weight": torch.ones(8)}).shape == (0, 8)


def test_operators():
    for kind, name in (("gate first", "rmsnorm"), ("no weight", "rmsnorm"), ("residual", "add_rmsnorm")):
        assert_operator(ours(kind, 16), make(kind, 5, 32), [name, f"{name}_backward"])


@pytest.mark.parametrize("kind", ["gate last", "residual"])
def test_torch_compile(kind):
    assert_compiles(ours(kind, 16), make(kind, 5, 32))
