"""The Triton grouped products against the equation: every way of loading, empty groups, rows behind the last one."""

import pytest
import torch

from lamella_kernels import tiles
from lamella_kernels.grouped_gemm import grouped_gemm, reference
from tests.kernels.gpu.building import (
    LIMITS,
    assert_compiles,
    assert_exact,
    assert_operator,
    between_fences,
    numbers,
    results_and_gradients,
)

# (F, D): rows of 16-bit numbers that are multiples of 16 bytes come by descriptors from sm_90 on; of 128 bytes by
# vectors; others number by number
WIDTHS = {"descriptors": (40, 72), "vectors": (64, 128), "odd": (33, 21)}


def make(counts, widths=(33, 21), dtype=torch.float32, behind=0, index=torch.int64):
    width, channels = widths
    x, weight = numbers(dtype)(sum(counts) + behind, channels), numbers(dtype, 1)(len(counts), width, channels)
    return {"x": x, "weight": weight, "counts": between_fences(torch.tensor(counts, dtype=index))}


def ours(inputs):
    return grouped_gemm(inputs["x"], inputs["weight"], inputs["counts"])


def theirs(inputs):
    return reference.grouped_gemm(inputs["x"], inputs["weight"], inputs["counts"])


def check(inputs, arch=90):
    with tiles.compiled_for(arch):
        return assert_exact(ours, theirs, inputs, LIMITS[inputs["x"].dtype])


def test_equals_reference(fenced):
    """A group without rows, one of more than a tile, rows behind the last."""
    found = check(make([0, 70, 1, 0, 29], behind=7))
    assert not found["weight"][[0, 3]].any() and not found["out0"][100:].any() and not found["x"][100:].any()


@pytest.mark.parametrize("kind", WIDTHS)
def test_bfloat16(kind, fenced):
    found = check(make([63, 0, 137], WIDTHS[kind], torch.bfloat16, 3, torch.int32), 80 if kind == "vectors" else 90)
    assert found["weight"].dtype == torch.bfloat16


@pytest.mark.full
@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("counts", [[1], [100, 0], [0, 0, 257], [63, 1, 0, 100, 257], [0, 0]], ids=str)
def test_counts_widths_types_and_architectures(counts, kind, dtype, arch, fenced):
    check(make(counts, WIDTHS[kind], dtype, behind=2), arch)


@pytest.mark.full
def test_more_tiles_than_programs(fenced):
    """A program multiplies several tiles, in columns, too."""
    check(make([130, 1, 0, 300], (530, 24), torch.bfloat16))
    check(make([2] * 70, (264, 136), torch.float16))


def test_rows_that_are_apart():
    """Some columns of a wider tensor, and an expanded gradient."""
    inputs = make([5, 0, 3], (16, 48))
    inputs["weight"] = numbers(torch.float32, 1)(3, 16, 32)

    def both(form):
        def run(given):
            return form({**given, "x": given["x"][:, 16:]}).sum(-1, keepdim=True).expand(-1, 4)

        return run

    assert_exact(both(ours), both(theirs), inputs, LIMITS[torch.float32])


def test_numbers_or_a_tensor():
    inputs, counts = make([5, 0, 3], (16, 8), torch.bfloat16), [5, 0, 3]
    found, again = (results_and_gradients(run, inputs) for run in (ours, lambda i: ours({**i, "counts": counts})))
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_weights_of_another_type(fenced):
    """Used in x's dtype; their gradient is not rounded to it."""
    inputs = make([5, 3], (16, 8), torch.bfloat16)
    rounded = {**inputs, "weight": inputs["weight"].detach().float().requires_grad_()}
    found, plain = (assert_exact(ours, theirs, given, LIMITS[torch.bfloat16]) for given in (rounded, inputs))
    assert found["weight"].dtype == torch.float32 and torch.equal(found["weight"].bfloat16(), plain["weight"])
    assert torch.equal(found["out0"], plain["out0"])


def test_frozen_arguments():
    inputs = make([2, 0, 3], (16, 8))
    for name in ("x", "weight"):
        given = {k: v.detach().requires_grad_(k == name) for k, v in inputs.items()}
        assert_exact(ours, theirs, given, LIMITS[torch.float32])


def test_the_host_reads_no_counts():
    """Tensors without memory have none to read."""
    inputs = {name: t.detach().to("meta").requires_grad_(name != "counts") for name, t in make([2, 0, 3]).items()}
    y = ours(inputs)
    y.sum().backward()
    assert y.shape == (5, 33) and inputs["weight"].grad.shape == (3, 33, 21)


def test_the_arguments_themselves_are_kept():
    """Not views or copies of the weight, which would keep memory alive that ZeRO 3 means to free."""
    inputs, kept = make([2, 0, 3], (16, 8)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(inputs)
    assert {id(t) for t in kept} == {id(t) for t in inputs.values()}
    inputs["weight"].data = torch.zeros_like(inputs["weight"])
    assert torch.autograd.grad(y.sum(), inputs["x"])[0].count_nonzero() == 0


def test_operators():
    assert_operator(ours, make([2, 0, 3], (16, 8)), ["grouped_gemm", "grouped_gemm_backward"])


def test_torch_compile():
    assert_compiles(ours, make([2, 0, 3], (16, 8), torch.bfloat16))
