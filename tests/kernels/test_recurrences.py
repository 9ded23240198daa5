"""What every recurrence must do: equal its reference, keep documents apart, hand its state over, repeat itself.

Each op's own file says how it is called and holds what only it must do.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch

from tests.kernels import test_linear_attention, test_selective_scan, test_ssd, test_wkv6, test_wkv7
from tests.kernels.building import (
    assert_agree,
    assert_apart,
    assert_close,
    assert_equal,
    assert_exact,
    assert_finite,
    resets,
    starting,
    values_and_gradients,
)


class Op(NamedTuple):
    """make(time, batch=, dtype=, seed=, initial=) -> inputs by name; run(inputs, reset) -> y, state."""

    make: Callable
    run: Callable
    run_reference: Callable
    tokens: tuple[str, ...]  # the inputs that come by token
    fp64: float = 1e-13
    fp32: float = 2e-6


def op_of(module, **limits):
    return Op(module.make, module.run, module.run_reference, module.TOKENS, **limits)


def attention(kind, normalize):
    module = test_linear_attention
    run, run_reference = (partial(f, normalize=normalize) for f in (module.run, module.run_reference))
    return Op(partial(module.make, kind=kind), run, run_reference, module.TOKENS[kind], fp64=1e-12, fp32=5e-6)


SCAN = op_of(test_selective_scan)
CASES = {
    "selective_scan-compiled": (SCAN, "compiled"),
    "selective_scan-eager": (SCAN, "eager"),
    "ssd": (op_of(test_ssd, fp32=1e-6), "eager"),
    "wkv6": (op_of(test_wkv6), "eager"),
    "wkv7": (op_of(test_wkv7), "eager"),
} | {
    f"linear_attention-{kind}-{'normalized' if normalize else 'plain'}": (attention(kind, normalize), "eager")
    for kind in test_linear_attention.TOKENS
    for normalize in (False, True)
}
BORDERS = [
    *((300, starts) for starts in ((0, 37, 38, 150, 299), (0, 150), (0, 149, 151, 298))),
    *((150, starts) for starts in ((0, 37, 38, 75, 129), (0, 64), (0, 63, 66, 128))),
]
PIECES = [
    *((100, 1, 156), (100, 1, 56), (31, 32, 33), (32, 64, 7)),
    *((1,) * 20, (1, 99), (40, 24, 36), (7, 1, 1, 71, 20)),
]
LENGTHS = (1, 2, 3, 31, 63, 64, 65, 70, 100, 129, 150, 257)

pytestmark = [
    pytest.mark.usefixtures("form"),
    pytest.mark.parametrize(("op", "form"), list(CASES.values()), ids=list(CASES), indirect=["form"]),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
def test_fp64_equals_reference(op, time, packed):
    assert_agree(op.run, op.run_reference, op.make(time), resets(time) if packed else None, limit=op.fp64)


@pytest.mark.parametrize("time", LENGTHS)
def test_fp32_equals_fp64(op, time):
    inputs = op.make(time, dtype=torch.float32)
    ours = assert_exact(op.run, op.run_reference, inputs, resets(time), limit=op.fp32)
    assert {v.dtype for v in ours.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_outputs(op, dtype):
    """Steps, decays, their like and the state are fp32 beside it."""
    inputs, reset = op.make(100, dtype=dtype), resets(100)
    eps = torch.finfo(dtype).eps

    def judge(inputs, reset):
        y, state = op.run_reference(inputs, reset)
        return y.to(dtype), state  # so that the gradient that comes in is rounded as for ours

    ours = assert_exact(op.run, judge, inputs, reset, limit=eps)
    assert_close(ours, values_and_gradients(op.run_reference, inputs, reset), eps / 8)  # rounded where ours is
    half = {name for name, value in ours.items() if value.dtype == dtype}
    assert half == {"y"} | {name for name in op.tokens if name not in ("dt", "decay", "log_w")}
    assert all(value.dtype == torch.float32 for name, value in ours.items() if name not in half)


@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_pieces_with_the_state_handed_over(op, pieces):
    def in_pieces(inputs, reset):
        ys, state, start = [], inputs["initial"], 0
        for length in pieces:
            now = slice(start, start + length)
            part = {name: value[:, now] if name in op.tokens else value for name, value in inputs.items()}
            y, state = op.run({**part, "initial": state}, reset[:, now])
            ys.append(y)
            start += length
        return torch.cat(ys, 1), state

    assert_agree(in_pieces, op.run, op.make(sum(pieces)), resets(sum(pieces)), limit=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time, starts", BORDERS)
def test_other_documents_have_no_influence_at_all(op, time, starts, dtype):
    """Several chunks of every op: borders before, at and after theirs."""
    assert_apart(op.run, op.make, op.tokens, starts, time, dtype)


@pytest.mark.parametrize("time", [20, 70])
def test_reset_at_the_first_token_drops_the_initial_state(op, time):
    inputs, reset = op.make(time), starting([0], time)
    y, _ = op.run(inputs, reset)
    without, _ = op.run({name: value for name, value in inputs.items() if name != "initial"}, reset)
    assert torch.equal(y, without)
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


@pytest.mark.parametrize("time", [130, 200, 257])
def test_twice_is_the_same_to_the_last_bit(op, time):
    inputs, reset = op.make(time, dtype=torch.float32), resets(time)
    assert_equal(*(values_and_gradients(op.run, inputs, reset) for _ in range(2)))


@pytest.mark.parametrize("time", [1, 63, 100, 130, 300])
def test_everything_is_written(op, poisoned, time):
    for reset in (None, resets(time)):
        assert_finite(values_and_gradients(op.run, op.make(time), reset))


def test_autocast_changes_nothing(op):
    inputs, reset = op.make(64, dtype=torch.float32), resets(64)
    expected = values_and_gradients(op.run, inputs, reset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(values_and_gradients(op.run, inputs, reset), expected)


@pytest.mark.parametrize("initial", [False, True])
def test_no_tokens(op, initial):
    made = op.make(3, initial=initial)
    inputs = {name: value.detach()[:, :0] if name in op.tokens else value for name, value in made.items()}
    with pytest.raises(ValueError, match="at least one token"):
        op.run(inputs)
