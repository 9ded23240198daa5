"""RWKV-7's recurrence against the equation: values, every gradient, packed documents, states handed over, extremes.

B batch, T time, H head, K key channel, V value channel.
"""

import math

import numpy as np
import pytest
import torch

from lamella_kernels.wkv7 import eager, reference, wkv7
from tests.kernels.wkv import (
    Calls,
    assert_close,
    fla_file,
    log_decays,
    normal,
    resets,
    values_and_gradients,
    wide_copy,
)

TOKENS = ("r", "log_w", "k", "v", "a", "b")


@pytest.fixture(autouse=True)
def form():
    """There is one form, in plain torch."""


def make(time, batch=2, heads=3, keys=6, values=5, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name, a and b as RWKV-7 has them; log_w and the state stay fp32 where the others are half precision."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = batch, time, heads, keys
    kk = torch.nn.functional.normalize(normal(*shape, seed=10 * seed + 4), dim=-1)
    inputs = {
        "r": normal(*shape, seed=10 * seed).to(dtype),
        "log_w": log_decays(*shape, seed=10 * seed + 3).to(wide),
        "k": normal(*shape, seed=10 * seed + 1).to(dtype),
        "v": normal(batch, time, heads, values, seed=10 * seed + 2).to(dtype),
        "a": -kk.to(dtype),
        "b": (kk * torch.sigmoid(normal(*shape, seed=10 * seed + 5))).to(dtype),
    }
    if initial:
        inputs["initial"] = normal(batch, heads, values, keys, seed=10 * seed + 6).to(wide)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def run(inputs, reset=None):
    named = {"reset_BT": reset, "initial_state_BHVK": inputs.get("initial"), "return_state": True}
    return wkv7(*(inputs[name] for name in TOKENS), **named)


def run_reference(inputs, reset=None):
    return reference.wkv7(*(inputs[name] for name in TOKENS), reset, inputs.get("initial"))


def test_recurrence_of_the_paper():
    """S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T and y_t = S_t r_t of arXiv 2503.14456, anew in numpy."""
    inputs, reset = make(40), resets(40)
    r, log_w, k, v, a, b, state = (x.detach().numpy() for x in inputs.values())
    expected = np.zeros_like(v)
    for row, h in np.ndindex(2, 3):
        S = state[row, h]
        for t in range(40):
            at = row, t, h
            S = np.zeros_like(S) if reset[row, t] else S
            S = S @ (np.diag(np.exp(log_w[at])) + np.outer(a[at], b[at])) + np.outer(v[at], k[at])
            expected[at] = S @ r[at]
    np.testing.assert_allclose(run(inputs, reset)[0].detach().numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.peer
@pytest.mark.parametrize("time", [5, 96])
def test_equals_flash_linear_attention(time):
    """Its naive recurrence of a diagonal plus low-rank transition, in fp32: values, and gradients by autograd."""
    theirs = fla_file("ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence
    inputs = make(time, dtype=torch.float32)

    def run_theirs(x):
        r, w, k, v, a, b = (x[name].transpose(1, 2) for name in TOKENS)
        r = r * r.shape[-1] ** 0.5  # it divides by that
        y, state = theirs(r, k, v, a, b, w, initial_state=x["initial"].mT)
        return y.transpose(1, 2), state.mT

    assert_close(values_and_gradients(run, inputs), values_and_gradients(run_theirs, inputs), 2e-6)


def test_a_replaced_value_is_gone():
    """Learning rate 1, no decay, the same unit key twice: the second value takes the first one's place."""
    key = torch.nn.functional.normalize(normal(1, 1, 1, 6), dim=-1).expand(1, 70, 1, 6)
    values = normal(1, 70, 1, 5, seed=3)
    y = wkv7(key, torch.zeros_like(key), key, values, -key, key)
    torch.testing.assert_close(y, values)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 2, 3, 31, 63, 64, 65, 150])
def test_fp64_equals_reference(time, packed):
    inputs, reset = make(time), resets(time) if packed else None
    assert_close(values_and_gradients(run, inputs, reset), values_and_gradients(run_reference, inputs, reset), 1e-13)


@pytest.mark.parametrize("chunk", [1, 2, 8, 16, 128])
def test_every_chunk_size_equals_reference(monkeypatch, chunk):
    """Also with documents that start exactly where chunks do."""
    monkeypatch.setattr(eager, "CHUNK", chunk)
    inputs = make(45)
    for reset in (None, resets(45), (torch.arange(45) % chunk == 0).expand(2, 45)):
        assert_close(
            values_and_gradients(run, inputs, reset), values_and_gradients(run_reference, inputs, reset), 1e-13
        )


@pytest.mark.parametrize("time", [1, 63, 257])
def test_fp32_equals_fp64(time):
    inputs, reset = make(time, dtype=torch.float32), resets(time)
    ours = values_and_gradients(run, inputs, reset)
    assert {v.dtype for v in ours.values()} == {torch.float32}
    assert_close(ours, values_and_gradients(run_reference, wide_copy(inputs), reset), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_outputs(dtype):
    inputs, reset = make(100, dtype=dtype), resets(100)
    ours = values_and_gradients(run, inputs, reset)
    assert all(ours[name].dtype == dtype for name in ("y", "r", "k", "v"))
    assert all(ours[name].dtype == torch.float32 for name in ("state", "log_w", "initial"))
    assert_close(ours, values_and_gradients(run_reference, wide_copy(inputs), reset), torch.finfo(dtype).eps)


@pytest.mark.parametrize("chunk", [2, 32])
def test_gradcheck(monkeypatch, chunk):
    monkeypatch.setattr(eager, "CHUNK", chunk)
    inputs = make(5, heads=1, keys=2, values=2)
    reset = torch.tensor([[False, False, True, False, False], [True, False, False, True, True]])
    with torch.no_grad():
        inputs["log_w"].clamp_(min=-3)
    assert torch.autograd.gradcheck(
        lambda *v: run(dict(zip(inputs, v, strict=True)), reset), tuple(inputs.values()), fast_mode=False
    )


@pytest.mark.parametrize("pieces", [(100, 1, 56), (1,) * 20, (32, 64, 7)])
def test_pieces_with_the_state_handed_over(pieces):
    inputs, reset = make(sum(pieces)), resets(sum(pieces))

    def in_pieces(inputs, reset):
        ys, state, start = [], inputs["initial"], 0
        for length in pieces:
            now = slice(start, start + length)
            part = {n: v[:, now] if n in TOKENS else v for n, v in inputs.items()}
            y, state = run({**part, "initial": state}, reset[:, now])
            ys.append(y)
            start += length
        return torch.cat(ys, 1), state

    ours = values_and_gradients(in_pieces, inputs, reset)
    assert_close(ours, values_and_gradients(run, inputs, reset), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [(0, 37, 38, 75, 129), (0, 64), (0, 63, 66, 128)])
def test_other_documents_have_no_influence_at_all(starts, dtype):
    """150 tokens are several chunks: borders before, at and after theirs."""
    time = 150
    ends = (*starts[1:], time)
    reset = torch.zeros(2, time, dtype=torch.bool)
    reset[:, list(starts)] = True
    inputs, others = (make(time, dtype=dtype, seed=seed, initial=False) for seed in (0, 9))

    def outputs_by_token(inputs):
        y = run(inputs, reset)[0]
        tokens = {name: inputs[name] for name in TOKENS}
        weight = (3 * inputs["v"].detach()).cos()
        return {"y": y, **dict(zip(tokens, torch.autograd.grad(y, list(tokens.values()), weight), strict=True))}

    before = outputs_by_token(inputs)
    for start, end in zip(starts, ends, strict=True):
        changed = {name: value.detach().clone() for name, value in inputs.items()}
        for name in TOKENS:
            other = others[name].detach()[:, start:end]
            changed[name][:, start:end] = other if name in ("a", "b") else 5 * other
        after = outputs_by_token({name: value.requires_grad_() for name, value in changed.items()})
        for name, value in before.items():
            elsewhere = torch.ones(time, dtype=torch.bool)
            elsewhere[start:end] = False
            assert torch.equal(value[:, elsewhere], after[name][:, elsewhere]), (name, start)
            here = value[:, start:end]  # of a document of one token nothing decays: that gradient stays 0
            assert not here.any() or not torch.equal(here, after[name][:, start:end])


def test_twice_is_the_same_to_the_last_bit():
    inputs, reset = make(130, dtype=torch.float32), resets(130)
    first, second = (values_and_gradients(run, inputs, reset) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reset_at_the_first_token_drops_the_initial_state():
    inputs = make(70)
    reset = torch.zeros(2, 70, dtype=torch.bool)
    reset[:, 0] = True
    y, _ = run(inputs, reset)
    without, _ = run({name: value for name, value in inputs.items() if name != "initial"}, reset)
    assert torch.equal(y, without)
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


@pytest.mark.parametrize("log_w", [0.0, -1e-8, -1e-3, -5.0, -80.0, -1e5, -math.inf], ids=str)
@pytest.mark.parametrize("time", [1, 100])
def test_decays_at_their_ends(time, log_w):
    """All decays the same, from 1 to 0: finite, and as near to fp64 as anywhere."""
    inputs = make(time, dtype=torch.float32)
    with torch.no_grad():
        inputs["log_w"].fill_(log_w)
    ours = values_and_gradients(run, inputs, resets(time))
    assert all(value.isfinite().all() for value in ours.values())
    theirs = values_and_gradients(run_reference, wide_copy(inputs), resets(time))
    if log_w == -math.inf:
        theirs["log_w"] = torch.zeros_like(theirs["log_w"])  # autograd has 0 * inf there
    assert_close(ours, theirs, 5e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e8], ids=str)
def test_huge_and_tiny_inputs(scale):
    inputs = make(130, dtype=torch.float32)
    with torch.no_grad():
        for name in ("r", "k", "v"):
            inputs[name].mul_(scale)
        inputs["initial"].mul_(scale**2)
    ours = values_and_gradients(run, inputs, resets(130))
    assert all(value.isfinite().all() for value in ours.values())
    assert_close(ours, values_and_gradients(run_reference, wide_copy(inputs), resets(130)), 5e-6)


def test_a_long_row():
    inputs, reset = make(4096, batch=1, heads=1, dtype=torch.float32), resets(4096, batch=1) & False
    ours = values_and_gradients(run, inputs, reset)
    assert all(value.isfinite().all() for value in ours.values())
    assert_close(ours, values_and_gradients(run, wide_copy(inputs), reset), 5e-6)


def cost(time):
    inputs = make(time, batch=1, heads=2, keys=16, values=16, dtype=torch.float32, initial=False)
    with Calls() as forward:
        y = run(inputs, resets(time, batch=1))[0]
    with Calls() as backward:
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return forward, backward


def test_calls_grow_by_chunks_alone():
    """A few calls for each chunk of the longer row, and no tensor that is more than linear in time."""
    chunks = (2048 - 256) // eager.CHUNK
    for short, long in zip(cost(256), cost(2048), strict=True):
        assert long.count - short.count <= 8 * chunks
        assert long.largest <= 8.1 * short.largest


@pytest.fixture
def poisoned():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("time", [1, 63, 100])
def test_everything_is_written(poisoned, time):
    assert torch.empty(3).isnan().all()
    for reset in (None, resets(time)):
        assert all(value.isfinite().all() for value in values_and_gradients(run, make(time), reset).values())


def test_autocast_changes_nothing():
    inputs, reset = make(64, dtype=torch.float32), resets(64)
    expected = values_and_gradients(run, inputs, reset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values_and_gradients(run, inputs, reset)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(2, 4, 3)}, "r_BTHK needs 4 dims"),
        ({"k": torch.zeros(2, 5, 1, 3)}, "k_BTHK has shape .* but T is 4 in r_BTHK"),
        ({"initial": torch.zeros(2, 1, 3, 2)}, "initial_state_BHVK has shape"),
        ({"a": torch.zeros(2, 4, 1, 3, dtype=torch.int64)}, "a_BTHK must be floating point"),
        ({"log_w": torch.zeros(2, 4, 1, 3, dtype=torch.bfloat16)}, "log_w_BTHK must be float32 or float64"),
        ({"reset": torch.zeros(2, 4)}, "reset_BT must be bool"),
        ({"b": torch.zeros(2, 4, 1, 3, device="meta")}, "b_BTHK is on meta"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    inputs = {name: torch.zeros(2, 4, 1, 2 if name == "v" else 3) for name in TOKENS} | {"reset": None} | change
    with pytest.raises(ValueError, match=f"wkv7: {message}"):
        run(inputs, inputs["reset"])


def test_no_tokens():
    inputs = {name: value.detach()[:, :0] if name in TOKENS else value for name, value in make(3).items()}
    with pytest.raises(ValueError, match="at least one token"):
        run(inputs)
