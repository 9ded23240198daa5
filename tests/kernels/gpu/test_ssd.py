"""The Triton SSD against the equation, one token at a time: chunks, documents, states, widths, extremes."""

from functools import partial
from typing import Any

import pytest
import torch

from lamella_kernels.ssd import reference, ssd
from tests.kernels import test_ssd
from tests.kernels.building import assert_apart, assert_equal, resets, starting
from tests.kernels.gpu.building import (
    DEVICE,
    LIMITS,
    assert_compiles,
    assert_exact,
    assert_operator,
    between_fences,
    results_and_gradients,
)

FP32, BF16 = torch.float32, torch.bfloat16
SMALL: dict[str, Any] = {"heads": 2, "groups": 1}


def make(time, dtype=FP32, reset=None, **sizes):
    """Inputs by name, between fences; `reset` True: documents of all lengths, or where they start."""
    made = test_ssd.make(time, dtype=dtype, **sizes)
    inputs = {name: between_fences(value).requires_grad_() for name, value in made.items()}
    if reset is not None:
        batch = made["x"].shape[0]
        inputs["reset"] = between_fences(resets(time, batch) if reset is True else starting(reset, time, batch))
    return inputs


def ours(inputs):
    a = inputs
    named = {"reset_BT": a.get("reset"), "initial_state_BHPN": a.get("initial")}
    return ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], a.get("D"), **named, return_state=True)


def theirs(inputs, dtype=None):
    a = inputs
    y, state = reference.ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], a.get("D"), a.get("reset"), a.get("initial"))
    return y.to(dtype or y.dtype), state  # so that the gradient that comes in is rounded as for ours


def assert_right(inputs):
    """In half precision A's gradient is held less closely: one sum over all tokens, whose terms cancel."""
    dtype = inputs["x"].dtype
    return assert_exact(ours, partial(theirs, dtype=dtype), inputs, LIMITS[dtype], [] if dtype == FP32 else ["A"])


@pytest.mark.parametrize("reset", [pytest.param(None, marks=pytest.mark.full), True])
def test_equals_reference(reset, fenced):
    assert_right(make(40, reset=reset))


def test_half_precision(fenced):
    """The steps, A, D and the state are fp32 beside it."""
    inputs = make(40, BF16, True, **SMALL)
    found = assert_right(inputs)
    assert found["out1"].dtype == FP32
    assert {n: found[n].dtype for n in inputs if n != "reset"} == {n: inputs[n].dtype for n in inputs if n != "reset"}


@pytest.mark.full
@pytest.mark.parametrize("reset", [None, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("time", [1, 31, 32, 33, 63, 64, 65, 100, 257])
def test_lengths_and_types(time, dtype, reset, fenced):
    assert_right(make(time, dtype, reset, **SMALL))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "states"),
    [(1, 1, 1, 1), (3, 3, 5, 17), (6, 2, 16, 16), (2, 1, 100, 40), (2, 1, 40, 140), (20, 1, 3, 5)],
)
def test_widths(heads, groups, size, states, dtype, fenced):
    """More than a block of channels, of states, and more heads to a group than one program adds up."""
    assert_right(make(70, dtype, True, heads=heads, groups=groups, size=size, states=states))


@pytest.mark.full
def test_without_skip_and_states(fenced):
    inputs = make(40, initial=False, **SMALL)
    del inputs["D"]
    assert_right(inputs)


@pytest.mark.full
@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_outputs(index, fenced):
    """y or the state alone takes part in the loss."""
    inputs = make(40, reset=[0, 20], **SMALL)
    if index:
        for name in ("C", "D", "initial"):
            inputs[name].requires_grad_(False)
    assert_exact(lambda a: ours(a)[index], lambda a: theirs(a, a["x"].dtype)[index], inputs, LIMITS[FP32])


def run(inputs, reset=None):
    return ours({**inputs, "reset": reset if reset is None else reset.to(DEVICE)})


@pytest.mark.parametrize(
    ("time", "dtype", "starts"),
    [
        (40, FP32, (0, 20, 33)),
        *(pytest.param(100, d, s, marks=pytest.mark.full) for d in (FP32, BF16) for s in ((0, 64), (0, 31, 66, 96))),
        *(pytest.param(70, d, (0, 1, 32, 63), marks=pytest.mark.full) for d in (FP32, BF16)),
    ],
)
def test_other_documents_have_no_influence_at_all(time, dtype, starts):
    """Borders before, at and after those of chunks."""
    assert_apart(run, partial(test_ssd.make, **SMALL), test_ssd.TOKENS, starts, time, dtype)


def test_reset_at_the_first_token_drops_the_initial_state():
    inputs = make(20, reset=[0], **SMALL)
    y, _ = ours(inputs)
    assert torch.equal(y, ours({name: value for name, value in inputs.items() if name != "initial"})[0])
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


@pytest.mark.parametrize("time", [64, pytest.param(300, marks=pytest.mark.full)])
def test_extreme_steps_stay_finite_and_exact(time, fenced):
    """Decays from exactly 1 down to 0 beside each other in a chunk and beside resets."""
    inputs = make(time, reset=True, **SMALL)
    with torch.no_grad():
        steps = torch.logspace(-6, 4, 64).repeat(-(-time // 64))[:time].view(1, time, 1)
        inputs["dt"].mul_(steps.to(DEVICE))
        inputs["dt"][:, ::7] = 0
    assert_right(inputs)


@pytest.mark.full
def test_steep_decays_keep_the_digits_of_gentle_ones():
    """Exponents add up to thousands in a chunk, while those of neighbours differ by little."""
    inputs = make(64, **SMALL)
    with torch.no_grad():
        inputs["dt"][:, :16], inputs["dt"][:, 16:], inputs["A"][:] = 40.0, 0.01, -1.0
        uneven = torch.rand(inputs["dt"].shape, generator=torch.Generator().manual_seed(5))
        inputs["dt"].mul_(1 + 0.1 * uneven.to(DEVICE))
    assert_right(inputs)


@pytest.mark.full
@pytest.mark.parametrize("pieces", [(40, 24, 36), (1, 99), (31, 32, 37)])
def test_pieces_with_the_state_handed_over(pieces):
    def in_pieces(inputs):
        ys, state, start = [], inputs["initial"], 0
        for length in pieces:
            now = slice(start, start + length)
            part = {n: v[:, now] if n in (*test_ssd.TOKENS, "reset") else v for n, v in inputs.items()}
            y, state = ours({**part, "initial": state})
            ys.append(y)
            start += length
        return torch.cat(ys, 1), state

    assert_exact(in_pieces, lambda a: theirs(a, a["x"].dtype), make(100, reset=True, **SMALL), LIMITS[FP32])


@pytest.mark.full
def test_rows_that_are_apart_and_types_that_differ():
    """Slices of a fused projection are read where they lie; B of a wider type than x widens the products."""
    whole = between_fences(torch.randn(2, 40, 2 * 3 + 2 * 5, generator=torch.Generator().manual_seed(0)))
    inputs = {"whole": whole.requires_grad_()} | {n: v for n, v in make(40, **SMALL).items() if n in ("dt", "A", "D")}

    def parts(form):
        def call(a):
            x, B, C = a["whole"].split([6, 5, 5], -1)
            shaped = {"x": x.unflatten(-1, (2, 3)), "B": B.unsqueeze(2), "C": C.unsqueeze(2)}
            y, state = form({**a, **shaped})
            return y.sum(-1, keepdim=True).expand(2, 40, 2, 3), state

        return call

    assert_exact(parts(ours), parts(lambda a: theirs(a, a["x"].dtype)), inputs, LIMITS[FP32])
    mixed = make(20, **SMALL)
    with torch.no_grad():
        rounded = {**mixed, "x": mixed["x"].to(BF16)}
        widened = {**mixed, "x": rounded["x"].float()}
        assert torch.equal(ours(rounded)[0], ours(widened)[0].to(BF16))


@pytest.mark.full
def test_twice_is_the_same_to_the_last_bit():
    inputs = make(100, reset=True)
    assert_equal(*(results_and_gradients(ours, inputs) for _ in range(2)))


def test_operator():
    assert_operator(ours, make(5, reset=[0, 2], **SMALL), ["ssd", "ssd_backward"])


def test_torch_compile():
    assert_compiles(ours, make(5, reset=[0, 2], **SMALL))
