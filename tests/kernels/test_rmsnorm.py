"""The root mean square norm in plain torch against the equation: every kind, values and gradients."""

import pytest
import torch

from lamella_kernels.rmsnorm import reference, rmsnorm
from tests.kernels.building import assert_close, assert_gradients, source

EPS = 1e-5
KINDS = ["plain", "no weight", "residual", "gate first", "gate last"]


def make(kind, *shape, dtype=torch.float64):
    normal = source(0)
    inputs = {"x": normal(*shape)}
    if kind != "no weight":
        inputs["weight"] = normal(shape[-1])
    if kind not in ("plain", "no weight"):
        inputs["residual" if kind == "residual" else "gate"] = normal(*shape)
    return {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}


def run(inputs, kind, width):
    other = {name: inputs[name] for name in ("residual", "gate") if name in inputs}
    y = rmsnorm(inputs["x"], inputs.get("weight"), eps=EPS, width=width, gate_first=kind == "gate first", **other)
    return y if isinstance(y, tuple) else (y, None)


def run_reference(inputs, kind, width):
    x, weight, width = inputs["x"], inputs.get("weight"), width or inputs["x"].shape[-1]
    if kind == "residual":
        return reference.add_rmsnorm(x, inputs["residual"], weight, width, EPS)
    return reference.rmsnorm(x, inputs.get("gate"), weight, width, EPS, kind == "gate first"), None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [None, 6])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_equals_reference(kind, width, dtype, limit):
    assert_agree_in_fp64(make(kind, 2, 33, 24, dtype=dtype), kind, width, limit)


def assert_agree_in_fp64(inputs, kind, width, limit):
    found, wide = {}, {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    for function, given in ((run, inputs), (run_reference, wide)):
        results = [value for value in function(given, kind, width) if value is not None]
        weights = [source(7)(*value.shape).to(value.dtype) for value in results]
        gradients = torch.autograd.grad(results, list(given.values()), weights)
        found[function] = dict(zip(["y", "sum"], results, strict=False)) | dict(zip(given, gradients, strict=True))
    assert_close(found[run], found[run_reference], limit)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    assert_gradients(run, make(kind, 3, 4), kind, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4).int()}, "x must be floating point"),
        ({"x": torch.ones(2, 0)}, "with at least one channel"),
        ({"width": 3}, "width must divide the 4 channels, got 3"),
        ({"residual": torch.ones(2, 4), "gate": torch.ones(2, 4)}, "a residual or a gate, not both"),
        ({"gate": torch.ones(2, 5)}, "gate must be like x"),
        ({"residual": torch.ones(2, 4).bfloat16()}, "residual must be like x"),
        ({"weight_D": torch.ones(3)}, "weight_D must be floating point of shape"),
        ({"weight_D": torch.ones(4, device="meta")}, "weight_D is on meta"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=f"rmsnorm: .*{message}"):
        rmsnorm(**{"x": torch.ones(2, 4), "eps": 1e-6} | change)
