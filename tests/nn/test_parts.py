"""The norm, the embedding and the tied linear parts by themselves."""

import numpy as np
import pytest
import torch

from lamella.nn.linear import Column, Embedding, Row
from lamella.nn.norm import RMSNorm
from lamella.nn.shard import Whole
from tests.nn.building import OneOf, double, filled, noise, relative


def test_norm_equals_its_equation():
    norm, x = filled(RMSNorm(double(), 6, 0.01)).double(), noise(2, 3, 6)
    wanted = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight
    assert relative(norm(x), wanted) < 1e-15


def test_norm_of_bf16_is_computed_in_fp32():
    norm = filled(RMSNorm(Whole(torch.bfloat16), 6, 1e-6))
    x = (300 + noise(50, 6)).to(torch.bfloat16)
    assert torch.equal(norm(x), norm(x.float()).to(torch.bfloat16))


def test_ranks_of_an_embedding_add_up_to_the_whole():
    """Each token is found on one rank, the others add zeros."""
    whole = filled(Embedding(Whole(), 12, 5))
    tokens = torch.tensor([[0, 3, 11, 4], [7, 8, 5, 6]], dtype=torch.int32)
    total = 0
    for rank in range(3):
        part = Embedding(OneOf(rank, 3), 12, 5)
        with torch.no_grad():
            part.weight.copy_(whole.weight[4 * rank : 4 * rank + 4])
        total = total + part(tokens)
    assert torch.equal(total, whole.weight[tokens.long()])
    assert torch.equal(whole(tokens), whole.weight[tokens.long()])


def test_fused_segments_come_apart_in_their_order():
    column, x = filled(Column(double(), 3, (4, 2), bias=lambda g, shape: torch.ones(shape))).double(), noise(2, 3)
    wide, narrow = column(x)
    y = x.numpy() @ column.weight.detach().numpy().T + column.bias.detach().numpy()
    assert relative(wide, y[:, :4]) < 1e-15 and relative(narrow, y[:, 4:]) < 1e-15


@pytest.mark.parametrize("bias", [False, True])
def test_row_adds_its_bias_once(bias):
    row, x = filled(Row(double(), 4, 3, bias=bias)).double(), noise(2, 4)
    wanted = x.numpy() @ row.weight.detach().numpy().T + (row.bias.detach().numpy() if bias else np.zeros(3))
    assert relative(row(x), wanted) < 1e-15
