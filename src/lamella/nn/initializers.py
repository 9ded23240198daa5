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


def zeros(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape)


def ones(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape)


def log_arange(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    """log 1..N along the last dim: Mamba's A_log (S4D-real)."""
    return torch.arange(1, shape[-1] + 1).float().log().expand(shape)


def inverse_softplus_of_log_uniform(low: float, high: float) -> Initializer:
    """b with softplus(b) log-uniform in [low, high]: Mamba's dt bias."""

    def draw(generator: Generator, shape: tuple[int, ...]) -> Tensor:
        dt = torch.exp(torch.rand(shape, generator=generator) * math.log(high / low) + math.log(low))
        return dt + torch.log(-torch.expm1(-dt))

    return draw
