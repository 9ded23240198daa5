"""The mended interpreter computes what compiled kernels do: each of these is wrong, or fails, in the stock one."""

import pytest
import torch

from tests.kernels import interpreter

if reason := interpreter.install():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from triton.language.extra import libdevice

exponential = tl.exp
N = 16


@triton.jit
def product(a, b, c, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def arithmetic(a, b, c, n: tl.constexpr):
    i = tl.arange(0, n)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(c + i, x * y + tl.where(x > y, x, -y))


@triton.jit
def rounded(a, b, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(b + i, tl.load(a + i).to(tl.bfloat16))


@triton.jit
def added(a, b, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.atomic_add(b + i % 4, tl.load(a + i))


@triton.jit
def _decayed(decay, value, more, new):
    return decay * more, value * more + new


@triton.jit
def _largest(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def scanned(a, b, y, n: tl.constexpr):
    i = tl.arange(0, n)
    _, h = tl.associative_scan((tl.load(a + i), tl.load(b + i)), 0, _decayed)
    tl.store(y + i, h)


@triton.jit
def reduced(a, y, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(y + i, tl.reduce(tl.load(a + at), 1, _largest))


@triton.jit
def syntax(a, b, eps, count, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(a + i)
    total = x * 0
    for step in range(count):
        total += step.to(tl.float32) * eps.to(tl.float32)
    inside = (x > 0) and (i < 5)
    tl.store(b + i, tl.where(inside or (not (i < 9)), total, exponential(x) + libdevice.log1p(x * x)))


@triton.autotune(configs=[triton.Config({}, num_warps=w) for w in (1, 2)], key=[])
@triton.jit
def tuned(a, b, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(b + i, 2 * tl.load(a + i))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype)


def test_bfloat16():
    a, b, c = noise(N, N).bfloat16(), noise(N, N, seed=1).bfloat16(), empty(N, N)
    product[(1,)](a, b, c, N)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
    x, y, z = a[0].contiguous(), b[0].contiguous(), empty(N, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, z, N)
    assert torch.equal(z, x * y + torch.where(x > y, x, -y))


def test_rounding_is_to_the_nearest_even():
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7FC00001, 0x80000001, 0])
    x = bits.to(torch.int64).to(torch.int32).view(torch.float32).repeat(2)
    y = empty(N, dtype=torch.bfloat16)
    rounded[(1,)](x, y, N)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x.bfloat16()[~x.isnan()])


def test_atomics_in_bfloat16():
    a, b = torch.arange(N).bfloat16(), torch.zeros(4, dtype=torch.bfloat16)
    added[(1,)](a, b, N)
    assert torch.equal(b.float(), a.float().view(4, 4).sum(0))


def test_scans_and_reductions():
    a, b, y = noise(N), noise(N, seed=1), empty(N)
    scanned[(1,)](a, b, y, N)
    state, wanted = torch.tensor(0.0), []
    for decay, new in zip(a, b, strict=True):
        state = decay * state + new
        wanted.append(state)
    torch.testing.assert_close(y, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    square = noise(N, N, seed=2)
    reduced[(1,)](square, y, N)
    assert torch.equal(y, square.amax(1))


def test_loops_floats_truths_aliases_and_libdevice():
    a, b = noise(N), empty(N)
    syntax[(1,)](a, b, 0.1, 4, N)
    i = torch.arange(N)
    wanted = torch.where((a > 0) & (i < 5) | (i >= 9), 0.6, a.exp() + (a * a).log1p())
    torch.testing.assert_close(b, wanted, rtol=1e-6, atol=1e-6)


def test_tuning():
    a, b = noise(N), empty(N)
    tuned[(1,)](a, b, N)
    assert torch.equal(b, 2 * a)
