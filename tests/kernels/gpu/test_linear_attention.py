"""The Triton linear attention against the equation, one token at a time: chunks, documents, states, the divisor."""

from functools import partial
from typing import Any

import pytest
import torch

from lamella_kernels.linear_attention import State, linear_attention, reference
from tests.kernels import test_linear_attention as plain
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
SMALL: dict[str, Any] = {"heads": 2}


def make(time, kind="varying", dtype=FP32, reset=None, **sizes):
    """Inputs by name, between fences; `reset` True: documents of all lengths, or where they start."""
    made = plain.make(time, kind, dtype=dtype, **sizes)
    inputs = {name: between_fences(value).requires_grad_() for name, value in made.items()}
    if reset is not None:
        batch = made["q"].shape[0]
        inputs["reset"] = between_fences(resets(time, batch) if reset is True else starting(reset, time, batch))
    return inputs


def parts(y, state, normalize):
    return (y, *state) if normalize else (y, state.kv_BHKV)


def ours(inputs, normalize=True):
    a, reset, state = inputs, inputs.get("reset"), plain.state_of(inputs)
    named: dict[str, Any] = {"normalize": normalize, "reset_BT": reset, "initial_state": state, "return_state": True}
    y, state = linear_attention(a["q"], a["k"], a["v"], a["decay"], **named)
    return parts(y, state, normalize)


def theirs(inputs, normalize=True, dtype=None):
    a = inputs
    decay = a["decay"].clamp(min=-1e4)  # at -inf its gradient would be 0 times infinity
    state = plain.state_of(a) or (None, None, None)
    y, *found = reference.linear_attention(a["q"], a["k"], a["v"], decay, normalize, a.get("reset"), *state)
    return parts(y.to(dtype or y.dtype), State(*found), normalize)  # y rounds the gradient that comes in


def assert_right(inputs, normalize=True):
    """In half precision without a constant decay's gradient: a sum over all tokens, whose terms cancel."""
    dtype = inputs["q"].dtype
    if dtype != FP32 and inputs["decay"].dim() == 1:
        inputs["decay"].requires_grad_(False)
    both = partial(ours, normalize=normalize), partial(theirs, normalize=normalize, dtype=dtype)
    return assert_exact(*both, inputs, LIMITS[dtype])


@pytest.mark.parametrize("kind", plain.TOKENS)
def test_equals_reference(kind, fenced):
    assert_right(make(40, kind, reset=True if kind == "constant" else None, **SMALL), kind == "constant")


def test_half_precision(fenced):
    """The decays and the state are fp32 beside it."""
    inputs = make(70, "varying", BF16, True, batch=2, heads=1)
    found = assert_right(inputs)
    assert {found[f"out{i}"].dtype for i in (1, 2, 3)} == {FP32}
    assert {n: found[n].dtype for n in inputs if n != "reset"} == {n: inputs[n].dtype for n in inputs if n != "reset"}


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=pytest.mark.full), BF16])
def test_a_constant_decay_is_one_that_does_not_vary(dtype, fenced):
    """To the last bit; its gradient is the sum over tokens of the other's."""
    constant = make(70, "constant", dtype, True, **SMALL)
    varying = {**constant, "decay": constant["decay"].detach().expand(2, 70, -1).contiguous().requires_grad_()}
    found, expected = (results_and_gradients(ours, inputs) for inputs in (constant, varying))
    summed = expected.pop("decay").double().sum((0, 1))
    assert_close({"decay": found.pop("decay")}, {"decay": summed}, 1e-6)
    assert_equal(found, expected)


@pytest.mark.full
@pytest.mark.parametrize(("normalize", "reset"), [(False, None), (True, True)])
@pytest.mark.parametrize("kind", plain.TOKENS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("time", [1, 32, 63, 64, 100, 257])
def test_lengths_and_types(time, dtype, kind, normalize, reset, fenced):
    assert_right(make(time, kind, dtype, reset, **SMALL), normalize)


@pytest.mark.full
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("keys", "values"), [(1, 1), (17, 5), (40, 140), (140, 40), (100, 100)])
def test_widths(keys, values, dtype, normalize, fenced):
    """More than a block of keys, of values."""
    assert_right(make(70, "varying", dtype, True, heads=1, keys=keys, values=values), normalize)


@pytest.mark.full
@pytest.mark.parametrize("normalize", [False, True])
def test_without_states(normalize, fenced):
    inputs = make(70, initial=False, **SMALL)
    assert_right(inputs, normalize)
    a = inputs
    y = linear_attention(a["q"], a["k"], a["v"], a["decay"], normalize=normalize)
    assert isinstance(y, torch.Tensor) and torch.equal(y, ours(inputs, normalize)[0])


@pytest.mark.full
@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_outputs(index, fenced):
    """y or the state alone takes part in the loss."""
    inputs = make(40, reset=[0, 20], **SMALL)
    if index:
        for name in ("q", "initial"):
            inputs[name].requires_grad_(False)
    assert_exact(lambda a: ours(a)[index], lambda a: theirs(a)[index], inputs, LIMITS[FP32])


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
    assert_apart(run, partial(plain.make, **SMALL), plain.TOKENS["varying"], starts, time, dtype)


@pytest.mark.full
def test_reset_at_the_first_token_drops_the_initial_state():
    inputs = make(20, reset=[0], **SMALL)
    y, *_ = ours(inputs)
    assert torch.equal(y, ours({name: value for name, value in inputs.items() if name != "initial"})[0])
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


@pytest.mark.parametrize("time", [64, pytest.param(300, marks=pytest.mark.full)])
def test_extreme_decays(time, fenced):
    """From 1 to below the smallest number and to 0 itself, in every head, beside resets."""
    inputs = make(time, reset=True, **SMALL)
    kinds = -torch.tensor([0, 1e-7, 1e-3, 1, 90, 1e3, 1e30, torch.inf])
    turn = (torch.arange(time)[:, None] // 3 + torch.arange(2)) % 8
    with torch.no_grad():
        inputs["decay"].copy_(kinds[turn].expand(2, -1, -1))
    assert_right(inputs)


@pytest.mark.full
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pieces", [(40, 24, 36), (1, 99), (31, 32, 37)])
def test_pieces_with_the_state_handed_over(pieces, normalize):
    def in_pieces(inputs):
        ys, state, start = [], plain.state_of(inputs), 0
        for length in pieces:
            now = {n: v[:, start : start + length] if n in ("q", "k", "v", "decay", "reset") else v
                   for n, v in inputs.items()}  # fmt: skip
            named: dict[str, Any] = {"normalize": normalize, "reset_BT": now["reset"], "initial_state": state}
            y, state = linear_attention(now["q"], now["k"], now["v"], now["decay"], return_state=True, **named)
            ys.append(y)
            start += length
        return parts(torch.cat(ys, 1), state, normalize)

    assert_exact(in_pieces, partial(theirs, normalize=normalize), make(100, reset=True, **SMALL), LIMITS[FP32])


@pytest.mark.full
def test_rows_that_are_apart_and_types_that_differ():
    """Slices of a fused projection are read where they lie; the widest type of q, k and v is that of the products."""
    whole = between_fences(source(0)(2, 40, 2, 4 + 4 + 6).to(FP32))
    inputs = {"whole": whole.requires_grad_(), "decay": make(40, "constant", **SMALL)["decay"]}

    def split(form):
        return lambda a: form({**a, **dict(zip("qkv", a["whole"].split([4, 4, 6], -1), strict=True))})[0]

    assert_exact(split(ours), split(theirs), inputs, LIMITS[FP32])
    mixed = make(20, **SMALL)
    with torch.no_grad():
        rounded = {**mixed, "q": mixed["q"].to(BF16)}
        widened = {**mixed, "q": rounded["q"].float()}
        assert torch.equal(ours(rounded)[0], ours(widened)[0].to(BF16))


@pytest.mark.peer
@pytest.mark.parametrize("kind", plain.TOKENS)
def test_equals_flash_linear_attention(kind):
    """Its chunked kernels, in values and gradients."""
    theirs = imported("fla.ops.simple_gla").chunk_simple_gla
    inputs = make(70, kind, batch=1, heads=2, keys=16, values=16)
    decay = "g_gamma" if kind == "constant" else "g"
    if kind == "constant":  # theirs has no gradient
        inputs["decay"].requires_grad_(False)

    def run_theirs(a):
        named = {decay: a["decay"], "scale": 1.0, "initial_state": a["initial"], "output_final_state": True}
        return theirs(a["q"], a["k"], a["v"], **named)

    ours_found, found = (results_and_gradients(f, inputs) for f in (partial(ours, normalize=False), run_theirs))
    assert_close(ours_found, found, 2e-6)


@pytest.mark.full
def test_twice_is_the_same_to_the_last_bit():
    inputs = make(100, reset=True)
    assert_equal(*(results_and_gradients(ours, inputs) for _ in range(2)))


def test_operator():
    names = ["linear_attention", "linear_attention_backward"]
    assert_operator(ours, make(5, "constant", reset=[0, 2], batch=1, **SMALL), names)


@pytest.mark.parametrize("kind", [pytest.param("constant", marks=pytest.mark.full), "varying"])
def test_torch_compile(kind):
    assert_compiles(ours, make(5, kind, reset=[0, 2], **SMALL))
