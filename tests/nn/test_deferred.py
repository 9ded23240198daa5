"""A linear whose weight gradient waits: autograd's gradients, no sooner than they are asked for."""

import pytest
import torch
import torch.nn.functional as F

from lamella.nn.deferred import WeightGradients
from tests.nn.building import noise, relative

SMALL = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def parameters(dtype):
    """Weights as they are kept: fp32 under bf16 activations."""
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    return [torch.nn.Parameter(noise(*shape, seed=i, dtype=kept)) for i, shape in enumerate([(5, 4), (4, 5), (5,)])]


def through(linear, x, first, second, bias):
    """The first weight is used twice, the second time transposed by its shape: as a tied one."""
    h = torch.tanh(linear(x, first, bias))
    return linear(torch.tanh(linear(h, second, None)), first, None)


def gradients(linear, dtype, finish=lambda: None):
    x, held = noise(2, 3, 4, seed=7, dtype=dtype).requires_grad_(), parameters(dtype)
    through(linear, x, *held).backward(noise(2, 3, 5, seed=8, dtype=dtype))
    finish()
    return x.grad, [p.grad for p in held]


def plain(x, weight, bias):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_gradients_are_autograd_s(dtype):
    queue = WeightGradients()
    of_x, wanted = gradients(plain, dtype)
    dx, got = gradients(queue.linear, dtype, lambda: queue.take()())
    assert relative(dx, of_x) < SMALL[dtype]
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, theirs) < SMALL[dtype]


def test_nothing_is_added_before_it_is_asked_for():
    queue = WeightGradients()
    of_x, wanted = gradients(plain, torch.float64)
    dx, (first, second, bias) = gradients(queue.linear, torch.float64)
    assert first is None and second is None and len(queue.waiting) == 3
    assert relative(dx, of_x) < 1e-14 and relative(bias, wanted[2]) < 1e-14


def test_what_is_taken_is_added_once_and_to_what_is_there():
    queue, (weight, _, _) = WeightGradients(), parameters(torch.float64)
    pieces = [noise(2, 3, 4, seed=seed).requires_grad_() for seed in range(3)]
    taken = []
    for x in pieces:
        queue.linear(x, weight, None).square().sum().backward()
        taken.append(queue.take())
        assert queue.waiting == []
    for add in (taken[1], taken[0], taken[2]):  # in whatever order the schedule asks
        add()
    wanted = torch.autograd.grad(sum(plain(x, weight, None).square().sum() for x in pieces), weight)[0]
    assert relative(weight.grad, wanted) < 1e-14
    queue.take()()
    assert relative(weight.grad, wanted) < 1e-14
