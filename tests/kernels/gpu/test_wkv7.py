"""The Triton wkv7 against the equation, one token at a time: chunks, documents, states, widths, extremes."""

from functools import partial
from typing import Any

import pytest
import torch

from lamella_kernels import forms
from lamella_kernels.wkv7 import wkv7
from tests.kernels import test_wkv7 as plain
from tests.kernels.building import assert_apart, assert_close, assert_equal, resets, source, starting
from tests.kernels.fla import imported
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
SMALL: dict[str, Any] = {"batch": 1, "heads": 2}
ONE: dict[str, Any] = {"batch": 1, "heads": 1}


def make(time, dtype=FP32, reset=None, **sizes):
    """Inputs by name, between fences; `reset` True: documents of all lengths, or where they start."""
    made = plain.make(time, dtype=dtype, **sizes)
    inputs = {name: between_fences(value).requires_grad_() for name, value in made.items()}
    if reset is not None:
        batch = made["r"].shape[0]
        inputs["reset"] = between_fences(resets(time, batch) if reset is True else starting(reset, time, batch))
    return inputs


def ours(inputs):
    return plain.run(inputs, inputs.get("reset"))


def theirs(inputs, dtype=None):
    y, state = plain.run_reference(inputs, inputs.get("reset"))
    return y.to(dtype or y.dtype), state  # so that the gradient that comes in is rounded as for ours


def assert_right(inputs):
    dtype = inputs["r"].dtype
    return assert_exact(ours, partial(theirs, dtype=dtype), inputs, LIMITS[dtype])


@pytest.mark.parametrize("reset", [pytest.param(None, marks=pytest.mark.full), True])
def test_equals_reference(reset, fenced):
    assert_right(make(37, reset=reset, heads=1))


def test_half_precision(fenced):
    """log_w and the states are fp32 beside it. Two chunks of 32."""
    inputs = make(63, BF16, True, keys=40, values=24, **ONE)
    found = assert_right(inputs)
    assert found["out1"].dtype == FP32
    assert {n: found[n].dtype for n in inputs if n != "reset"} == {n: inputs[n].dtype for n in inputs if n != "reset"}


@pytest.mark.full
@pytest.mark.parametrize("reset", [None, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("time", [2, 31, 32, 33, 63, 64, 65, 100, 257])
def test_lengths_and_types(time, dtype, reset, fenced):
    assert_right(make(time, dtype, reset, **SMALL))


WIDTHS = [(2, 3), (5, 17), (16, 16), (33, 64), (64, 64), (128, 128), (64, 100)]


@pytest.mark.full
@pytest.mark.parametrize(("keys", "values", "dtype"), [(*w, d) for w in WIDTHS for d in (FP32, BF16)] + [(1, 1, FP32)])
def test_widths(keys, values, dtype, fenced):
    """In half precision not of one channel: there the terms of a sum cancel, and rounding is what is left."""
    assert_right(make(70, dtype, True, keys=keys, values=values, **ONE))


@pytest.mark.parametrize(("keys", "dtype"), [(65, FP32), (129, BF16)])
def test_wider_heads_run_in_plain_torch(keys, dtype):
    inputs = make(2, dtype, keys=keys, **ONE)
    found = results_and_gradients(ours, inputs)
    with forms.use("eager"):
        assert_equal(results_and_gradients(ours, inputs), found)


@pytest.mark.full
def test_without_initial_state_and_any_keys(fenced):
    """a and b need be no removal of a unit key."""
    inputs = make(50, initial=False, **SMALL)
    normal = source(7)
    with torch.no_grad():
        for name in ("a", "b"):
            inputs[name].copy_(0.5 * normal(*inputs[name].shape))
    assert_right(inputs)


@pytest.mark.full
@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_outputs(index, fenced):
    """y or the state alone takes part in the loss."""
    inputs = make(40, reset=[0, 20], **SMALL)
    if index:
        for name in ("r", "initial"):
            inputs[name].requires_grad_(False)
    assert_exact(lambda a: ours(a)[index], lambda a: theirs(a)[index], inputs, LIMITS[FP32])


def run(inputs, reset=None):
    return ours({**inputs, "reset": reset if reset is None else reset.to(DEVICE)})


@pytest.mark.parametrize(
    ("time", "dtype", "starts"),
    [
        (20, FP32, (0, 9)),
        *(pytest.param(70, d, s, marks=pytest.mark.full) for d in (FP32, BF16) for s in ((0, 64), (0, 31, 45, 66))),
        *(pytest.param(70, d, (0, 1, 32, 63), marks=pytest.mark.full) for d in (FP32, BF16)),
    ],
)
def test_other_documents_have_no_influence_at_all(time, dtype, starts):
    """Borders before, at and after those of chunks."""
    assert_apart(run, partial(plain.make, heads=1), plain.TOKENS, starts, time, dtype)


def test_reset_at_the_first_token_drops_the_initial_state():
    inputs = make(20, reset=[0], **ONE)
    y, _ = ours(inputs)
    assert torch.equal(y, ours({name: value for name, value in inputs.items() if name != "initial"})[0])
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


@pytest.mark.parametrize("reset", [True, pytest.param(None, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=pytest.mark.full)])
def test_extreme_decays_stay_finite_and_exact(dtype, reset, fenced):
    """Decays from exactly 1 down to 0 beside each other in a chunk and beside resets; minus infinity too."""
    inputs = make(32, dtype, reset, **ONE)
    with torch.no_grad():
        steps = -torch.logspace(-6, 4, 32).view(1, 32, 1, 1).expand_as(inputs["log_w"])
        inputs["log_w"].copy_(steps[:, torch.randperm(32, generator=torch.Generator().manual_seed(3))])
        inputs["log_w"][:, ::7] = 0
        inputs["log_w"][:, 3::11, :, 1] = -1e30
    found = assert_right(inputs)
    with torch.no_grad():
        inputs["log_w"][inputs["log_w"] == -1e30] = -torch.inf
    assert_equal(results_and_gradients(ours, inputs), found)


@pytest.mark.full
def test_steep_decays_keep_the_digits_of_gentle_ones(fenced):
    """Exponents add up to thousands in a chunk, while those of neighbours differ by little."""
    inputs = make(64, **SMALL)
    with torch.no_grad():
        inputs["log_w"][:, :16], inputs["log_w"][:, 16:] = -60.0, -0.01
        uneven = torch.rand(inputs["log_w"].shape, generator=torch.Generator().manual_seed(5))
        inputs["log_w"].mul_(1 + 0.1 * uneven.to(DEVICE))
    assert_right(inputs)


def test_a_replaced_value_is_gone():
    """The inverse of a triangle of ones, by which the first values cancel exactly."""
    normal = source(3)
    key = torch.nn.functional.normalize(normal(1, 1, 1, 6), dim=-1).float().expand(1, 20, 1, 6).to(DEVICE)
    values = normal(1, 20, 1, 5).float().to(DEVICE)
    torch.testing.assert_close(wkv7(key, torch.zeros_like(key), key, values, -key, key), values, rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMITS)
def test_keys_that_are_alike(dtype, fenced):
    """Each value takes most of the last one's place: what the chunk's inverse is multiplied by cancels."""
    inputs = make(130, dtype, keys=64, values=40, **ONE)
    with torch.no_grad():
        one = source(5)(1, 1, 1, 64).to(DEVICE)
        kk = torch.nn.functional.normalize(one + 4 * inputs["a"].double(), dim=-1)
        inputs["log_w"].mul_(0.01)
        for name, value in (("k", kk), ("a", -kk), ("b", 0.95 * kk)):
            inputs[name].copy_(value)
    assert_right(inputs)


@pytest.mark.full
@pytest.mark.parametrize("pieces", [(40, 24, 36), (1, 1, 98), (31, 32, 37)])
def test_pieces_with_the_state_handed_over(pieces):
    def in_pieces(inputs):
        ys, state, start = [], inputs["initial"], 0
        for length in pieces:
            now = slice(start, start + length)
            part = {n: v[:, now] if n in (*plain.TOKENS, "reset") else v for n, v in inputs.items()}
            y, state = ours({**part, "initial": state})
            ys.append(y)
            start += length
        return torch.cat(ys, 1), state

    assert_exact(in_pieces, theirs, make(100, reset=True, **SMALL), LIMITS[FP32])


@pytest.mark.full
def test_rows_that_are_apart_and_types_that_differ():
    """Slices of a fused projection; v of a wider type than r widens the products."""
    made = make(40, **SMALL)
    whole = torch.cat([made[name].detach() for name in ("r", "k", "a", "b")], -1)
    inputs = {"whole": whole.requires_grad_(), "log_w": made["log_w"], "v": made["v"]}

    def parts(form):
        def call(a):
            named = dict(zip(("r", "k", "a", "b"), a["whole"].chunk(4, -1), strict=True))
            y, state = form({"log_w": a["log_w"], "v": a["v"], **named})
            return y.sum(-1, keepdim=True).expand(1, 40, 2, 3), state

        return call

    assert_exact(parts(ours), parts(theirs), inputs, LIMITS[FP32])
    with torch.no_grad():
        rounded = {**made, "r": made["r"].to(BF16)}
        widened = {**made, "r": rounded["r"].float()}
        assert torch.equal(ours(rounded)[0], ours(widened)[0].to(BF16))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*does not support float32 on some platforms")
def test_equals_flash_linear_attention():
    """Its chunked kernels, in values and gradients, with decays as RWKV-7 has them."""
    theirs = imported("fla.ops.rwkv7").chunk_rwkv7
    inputs = make(40, keys=16, values=16, **ONE)
    with torch.no_grad():
        inputs["log_w"].copy_(-0.6065 * torch.sigmoid(source(4)(*inputs["log_w"].shape)))

    def run_theirs(a):
        tokens = {"w": a["log_w"], **{name: a[name] for name in ("r", "k", "v", "a", "b")}}
        return theirs(**tokens, scale=1.0, initial_state=a["initial"].mT, output_final_state=True)

    def run_ours(a):
        y, state = ours(a)
        return y, state.mT

    found, expected = (results_and_gradients(f, inputs) for f in (run_ours, run_theirs))
    assert_close(found, expected, 2e-6)


@pytest.mark.full
def test_twice_is_the_same_to_the_last_bit():
    inputs = make(100, reset=True, **SMALL)
    assert_equal(*(results_and_gradients(ours, inputs) for _ in range(2)))


def test_operator():
    assert_operator(ours, make(5, reset=[0, 2], **ONE), ["wkv7", "wkv7_backward"])


def test_torch_compile():
    assert_compiles(ours, make(5, reset=[0, 2], **ONE))
