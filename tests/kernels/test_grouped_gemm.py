"""Grouped matrix multiplication against one row at a time: values, gradients, empty groups, what is kept."""

import functools

import pytest
import torch

from lamella_kernels.grouped_gemm import grouped_gemm, reference

COUNTS = [[5], [0], [3, 0, 4], [0, 0, 7], [1, 1, 1, 0], [0, 0]]


def make(counts, dtype=torch.float64, width=(6, 5)):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), width[0], generator=random, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(counts), *reversed(width), generator=random, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_()


def values_and_gradients(function, x, weight, counts):
    y = function(x, weight, counts)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy, materialize_grads=True)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_one_row_at_a_time(counts, dtype):
    x, weight = make(counts, dtype)
    ours = values_and_gradients(grouped_gemm, x, weight, counts)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    for got, want in zip(ours, values_and_gradients(reference.grouped_gemm, x64, weight64, counts), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert (got.double() - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()


def test_weights_are_used_in_the_dtype_of_x():
    x, weight = make([3, 2], torch.bfloat16)[0], make([3, 2], torch.float32)[1]
    y, dx, dw = values_and_gradients(grouped_gemm, x, weight, [3, 2])
    rounded = weight.detach().bfloat16().requires_grad_()
    want = values_and_gradients(grouped_gemm, x, rounded, [3, 2])
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert all(torch.equal(got.bfloat16(), w) for got, w in zip((y, dx, dw), want, strict=True))


def test_a_tensor_of_counts_may_leave_rows_over():
    """They give 0, get a gradient of 0, and no weight sees them."""
    x, weight = make([2, 0, 7])
    counts, dy = torch.tensor([2, 0, 3], dtype=torch.int32), torch.ones(9, 5, dtype=x.dtype) / 3
    y, short = grouped_gemm(x, weight, counts), grouped_gemm(x[:5], weight, counts.tolist())
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert torch.allclose(y, reference.grouped_gemm(x, weight, counts), rtol=1e-13, atol=1e-14)
    assert not y[5:].any() and not dx[5:].any()
    wanted = short, *torch.autograd.grad(short, (x, weight), dy[:5])
    assert all(torch.equal(got, want) for got, want in zip((y[:5], dx, dweight), wanted, strict=True))


def test_gradcheck():
    x, weight = make([2, 0, 3])
    assert torch.autograd.gradcheck(functools.partial(grouped_gemm, counts=[2, 0, 3]), (x, weight))


def test_only_what_needs_a_gradient_gets_one():
    x, weight = make([2, 3])
    (dw,) = torch.autograd.grad(grouped_gemm(x.detach(), weight, [2, 3]).sum(), weight)
    (dx,) = torch.autograd.grad(grouped_gemm(x, weight.detach(), [2, 3]).sum(), x)
    assert dw.shape == weight.shape and dx.shape == x.shape


def test_the_arguments_themselves_are_kept():
    """Not views or copies of the weight, which would keep memory alive that ZeRO 3 means to free."""
    x, weight = make([2, 0, 3])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = grouped_gemm(x, weight, [2, 0, 3])
    assert [t is given for t, given in zip(kept, (x, weight), strict=True)] == [True, True]
    weight.data = torch.zeros_like(weight)
    assert torch.autograd.grad(y.sum(), x)[0].count_nonzero() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"counts": [2, 3, 0]}, "counts must be 2 numbers of sum 5"),
        ({"counts": [2, 2]}, "counts must be 2 numbers of sum 5"),
        ({"counts": [6, -1]}, "counts must be 2 numbers of sum 5"),
        ({"counts": torch.tensor([2, 3, 0])}, "E is 2 in weight_EFD"),
        ({"counts": torch.tensor([2.0, 3.0])}, "counts must be int32 or int64"),
        ({"x": torch.zeros(5, 7)}, "D is 7 in x_ND"),
        ({"x": torch.zeros(5, 6, 1)}, "needs 2 dims"),
        ({"x": torch.zeros(5, 6, dtype=torch.int32)}, "must be floating point"),
    ],
    ids=str,
)
def test_wrong_inputs_are_named(change, message):
    x, weight = make([2, 3], torch.float32)
    with pytest.raises(ValueError, match=message):
        grouped_gemm(change.get("x", x), weight, change.get("counts", [2, 3]))
