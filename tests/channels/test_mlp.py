"""The dense channel mixer against its equation in numpy, and its count."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lamella.channels.base import config_of, names
from lamella.channels.mlp import Config
from lamella.config import check_options
from lamella.nn.shard import Whole
from tests.nn.building import OneOf, double, filled, noise, packed, relative

D_MODEL = 5
ROWS = packed([[3, 2], [5]])


def gelu(h):
    return np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in h])


ACTIVATIONS = {
    "swiglu": lambda h: np.split(h, 2)[0] / (1 + np.exp(-np.split(h, 2)[0])) * np.split(h, 2)[1],
    "geglu": lambda h: gelu(np.split(h, 2)[0]) * np.split(h, 2)[1],
    "gelu": gelu,
    "relu": lambda h: np.maximum(h, 0),
    "relu2": lambda h: np.maximum(h, 0) ** 2,
}


def config_for(activation):
    return check_options(Config, {"channel": "mlp", "d_ff": 6, "activation": activation}, "mlp")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_equation(activation):
    mlp = filled(config_for(activation).build(D_MODEL, double(), "here")).double()
    w_in, w_out = mlp.w_in.weight.detach().numpy(), mlp.w_out.weight.detach().numpy()
    x = noise(2, 5, D_MODEL)
    wanted = [[w_out @ ACTIVATIONS[activation](w_in @ token) for token in row] for row in x.numpy()]
    assert relative(mlp(x, ROWS), np.array(wanted)) < 1e-14


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matmul_flops_are_those_that_torch_counts(activation):
    config = config_for(activation)
    mlp = filled(config.build(D_MODEL, Whole(), "here"))
    with FlopCounterMode(display=False) as counter:
        mlp(noise(1, 5, D_MODEL, dtype=torch.float32), ROWS)
    assert counter.get_total_flops() == config.flops(D_MODEL, 5).matmul


def test_ranks_hold_a_share_of_the_gate_and_the_same_share_of_the_rest():
    """A rank that held the first rows of the fused weight would multiply gates with gates."""
    for rank in range(2):
        mlp = config_for("swiglu").build(D_MODEL, OneOf(rank, 2), "here")
        assert [box.whole[0] for box in mlp.w_in.weight.place.boxes] == [3 * rank, 6 + 3 * rank]
        assert [box.whole[1] for box in mlp.w_out.weight.place.boxes] == [3 * rank]


@pytest.mark.parametrize("name", names())
def test_is_named_as_its_file(name):
    assert config_of(name).build.__module__ == f"lamella.channels.{name}"
