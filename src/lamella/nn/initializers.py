"""How a parameter starts: functions (generator, whole shape) -> the whole tensor in fp32."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Initializer = Callable[[Generator, tuple[int, ...]], Tensor]


def normal(std: float) -> Initializer:
    return lambda generator, shape: torch.randn(shape, generator=generator) * std


def uniform(bound: float) -> Initializer:
    return lambda generator, shape: (torch.rand(shape, generator=generator) * 2 - 1) * bound


def constant(value: float) -> Initializer:
    return lambda generator, shape: torch.full(shape, value)


def by_channel(function: Callable[[Tensor], Tensor]) -> Initializer:
    """`function` of the channels' numbers 0, 1, ... in fp64; a shape of several dims numbers them in its order."""

    def draw(generator: Generator, shape: tuple[int, ...]) -> Tensor:
        return function(torch.arange(math.prod(shape), dtype=torch.float64)).float().view(shape)

    return draw


def orthogonal(gain: float) -> Initializer:
    """Orthonormal rows or columns, whichever are fewer, times `gain` (Saxe et al. 2013, arXiv 1312.6120)."""
    return lambda generator, shape: torch.nn.init.orthogonal_(torch.empty(shape), gain, generator)


def zeros(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape)


def ones(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape)


def log_arange(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    """log 1..N along the last dim: Mamba's A_log (S4D-real)."""
    return torch.arange(1, shape[-1] + 1).float().log().expand(shape)


def log_of_uniform(low: float, high: float) -> Initializer:
    """log a with a uniform in [low, high]: Mamba-2's A_log."""
    return lambda generator, shape: (torch.rand(shape, generator=generator) * (high - low) + low).log()


def inverse_softplus_of_log_uniform(low: float, high: float) -> Initializer:
    """b with softplus(b) log-uniform in [low, high]: Mamba's dt bias."""

    def draw(generator: Generator, shape: tuple[int, ...]) -> Tensor:
        dt = torch.exp(torch.rand(shape, generator=generator) * math.log(high / low) + math.log(low))
        return dt + torch.log(-torch.expm1(-dt))

    return draw


def scaled(init: Initializer, factor: float) -> Initializer:
    """`factor` times another initializer's values."""
    return init if factor == 1 else lambda generator, shape: factor * init(generator, shape)
