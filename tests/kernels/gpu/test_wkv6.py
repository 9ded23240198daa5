"""Triton's RWKV-6 against the equation: chunks, documents, states, decays at their ends, the peer."""

import math
from functools import partial

import pytest
import torch

from tests.kernels import test_wkv6 as plain
from tests.kernels.building import assert_apart, assert_close, assert_equal, assert_finite, resets, starting
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

OPERATORS = ["wkv6", "wkv6_backward"]


def make(time, dtype=torch.float32, packed=True, **sizes):
    inputs = plain.make(time, dtype=dtype, **sizes)
    inputs = {name: between_fences(value).requires_grad_() for name, value in inputs.items()}
    if packed:
        inputs["reset"] = between_fences(resets(time, len(inputs["r"])))
    return inputs


def ours(inputs):
    return plain.run(inputs, inputs.get("reset"))


def theirs(inputs):
    return plain.run_reference(inputs, inputs.get("reset"))


def retile(monkeypatch, **sizes):
    from lamella_kernels.wkv6 import gpu

    tiles = gpu.tiles
    monkeypatch.setattr(gpu, "tiles", lambda *a, **k: {w: sizes.get(w, v) for w, v in tiles(*a, **k).items()})


@pytest.fixture
def short(monkeypatch):
    """Chunks of 16 tokens, blocks of 16 channels: all loops turn in little time."""
    retile(monkeypatch, C=16, BK=16, BV=16)


@pytest.mark.parametrize("packed", [False, True])
def test_equals_reference(packed, short, fenced):
    """Two chunks, the last of one token; two blocks of the channels of keys or of values, both cut."""
    inputs = make(17, packed=packed, batch=1 + packed, heads=1, keys=5 if packed else 18, values=17)
    assert_exact(ours, theirs, inputs, LIMITS[torch.float32])


def test_bfloat16(fenced):
    """At the shipped tiles."""
    inputs = make(70, torch.bfloat16, batch=1, heads=1)
    found = assert_exact(ours, theirs, inputs, LIMITS[torch.bfloat16])
    half = {name for name, value in found.items() if value.dtype == torch.bfloat16}
    assert half == {"out0", "r", "k", "v"}


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("time", "keys", "values"), [(2, 6, 5), (63, 32, 32), (100, 6, 5), (257, 16, 16), (70, 64, 64), (34, 72, 40)]
)
def test_lengths_widths_and_types(time, keys, values, packed, dtype, fenced):
    inputs = make(time, dtype, packed, keys=keys, values=values, heads=2 if time < 100 else 1)
    found = assert_exact(ours, theirs, inputs, LIMITS[dtype])
    assert found["out0"].dtype == dtype and found["out1"].dtype == torch.float32
    assert all(found[name].dtype == value.dtype for name, value in inputs.items() if name != "reset")


@pytest.mark.full
@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_chunks_and_types(chunk, monkeypatch, fenced):
    retile(monkeypatch, C=chunk)
    for dtype in LIMITS:
        assert_exact(ours, theirs, make(129, dtype, heads=1), LIMITS[dtype])


def test_one_token_takes_the_reference(short):
    """A step of decoding starts no kernels."""
    inputs = make(1)
    assert_exact(ours, theirs, inputs, LIMITS[torch.float32])
    assert "Wkv6" not in type(ours(inputs)[0].grad_fn).__name__


@pytest.mark.parametrize("log_w", [0.0, -1e-8, -5.0, -1e5, -math.inf], ids=str)
def test_decays_at_their_ends(log_w, short):
    """All the same, from 1 to 0, beside resets: as near to fp64 as anywhere."""
    inputs = make(17, batch=1, heads=1) | {"reset": between_fences(starting([3, 9], 17, batch=1))}
    with torch.no_grad():
        inputs["log_w"].fill_(log_w)
    found = results_and_gradients(ours, inputs)
    assert_finite(found)
    wide = {n: v if n == "reset" else v.detach().double().requires_grad_() for n, v in inputs.items()}
    expected = results_and_gradients(theirs, wide)
    if log_w == -math.inf:
        expected["log_w"] = torch.zeros_like(expected["log_w"])  # autograd has 0 * inf there
    assert_close(found, expected, LIMITS[torch.float32])


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("mixed", [(0.0, -1e4), (-1e-6, -90.0), (-1e-3, -200.0)], ids=str)
def test_decays_side_by_side(mixed, dtype, fenced):
    """Strong and weak ones in turn: weak ones keep their digits behind strong ones."""
    inputs = make(130, dtype, heads=1)
    with torch.no_grad():
        strong = torch.rand(inputs["log_w"].shape, generator=torch.Generator().manual_seed(5)) < 0.1
        inputs["log_w"].copy_(torch.where(strong, mixed[1], mixed[0]))
    assert_exact(ours, theirs, inputs, LIMITS[dtype])


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_outputs(index, short):
    """y or the state alone takes part in the loss; no initial state."""
    inputs = make(5, packed=False, initial=False, batch=1, heads=1)
    if index == 1:
        inputs["r"].requires_grad_(False)
        inputs["u"].requires_grad_(False)
    assert_exact(lambda a: ours(a)[index], lambda a: theirs(a)[index], inputs, LIMITS[torch.float32])


def test_rows_that_are_apart(short):
    """Slices of one projection and an expanded gradient are read where they lie."""
    inputs = make(7, packed=False, batch=1, heads=2, keys=4, values=4)
    inputs["r"] = between_fences(torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(3))).requires_grad_()

    def both(form):
        def run(given):
            parts = (part.unflatten(2, (2, 4)) for part in given["r"].split(8, -1))
            named = given | dict(zip("rkv", parts, strict=True))
            return form(named)[0].sum(-1, keepdim=True).expand(1, 7, 2, 3)

        return run

    del inputs["k"], inputs["v"]
    assert_exact(both(ours), both(theirs), inputs, LIMITS[torch.float32])


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "time", "starts"),
    [
        (torch.float32, 70, (0, 16, 33, 64)),
        (torch.bfloat16, 130, (0, 63, 66, 128)),
        (torch.bfloat16, 80, (0, 37, 38, 64, 79)),
    ],
)
def test_other_documents_have_no_influence_at_all(dtype, time, starts):
    """Borders before, at and after those of chunks and levels."""
    assert_apart(plain.run, partial(plain.make, heads=1), plain.TOKENS, starts, time, dtype)


def test_other_documents_of_a_short_row(short):
    assert_apart(plain.run, partial(plain.make, heads=1), plain.TOKENS, (0, 5), 12, torch.bfloat16)


def test_reset_at_the_first_token_drops_the_initial_state(short):
    inputs = make(5, packed=False, heads=1) | {"reset": starting([0], 5)}
    y, _ = ours(inputs)
    assert torch.equal(y, ours({name: value for name, value in inputs.items() if name != "initial"})[0])
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


@pytest.mark.full
def test_twice_is_the_same_to_the_last_bit():
    inputs = make(130)
    assert_equal(*(results_and_gradients(ours, inputs) for _ in range(2)))


@pytest.mark.full
def test_pieces_with_the_state_handed_over():
    """Chunks that begin elsewhere, and single tokens between."""
    inputs = make(100)

    def in_pieces(given):
        ys, state, start = [], given["initial"], 0
        for length in (40, 1, 24, 35):
            now = slice(start, start + length)
            part = {name: given[name][:, now] for name in (*plain.TOKENS, "reset")} | {"u": given["u"]}
            y, state = ours({**part, "initial": state})
            ys.append(y)
            start += length
        return torch.cat(ys, 1), state

    assert_exact(in_pieces, theirs, inputs, LIMITS[torch.float32])


def test_operator(short):
    assert_operator(ours, make(3, batch=1, heads=1), OPERATORS)


def test_torch_compile(short):
    assert_compiles(ours, make(3, batch=1, heads=1))


@pytest.mark.peer
@pytest.mark.full
def test_equals_flash_linear_attention():
    """Its chunked kernels, values and gradients; of decays near to 0 they make differences of infinities."""
    chunk_rwkv6 = imported("fla.ops.rwkv6").chunk_rwkv6
    made = make(70, packed=False, batch=1, heads=2, keys=16, values=16)
    made["log_w"].data.clamp_(min=-2)
    inputs = {name: value.detach().to(DEVICE) for name, value in made.items()}

    def run_theirs(a):
        r, k, v, w = (a[name] for name in plain.TOKENS)
        return chunk_rwkv6(r, k, v, w, a["u"], scale=1.0, initial_state=a["initial"], output_final_state=True)

    given = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    assert_close(results_and_gradients(ours, given), results_and_gradients(run_theirs, given), 1e-5)


def test_what_the_kernels_do_not_take():
    """fp64 goes to plain torch."""
    assert "Wkv6" in type(plain.run(plain.make(3))[0].grad_fn).__name__
