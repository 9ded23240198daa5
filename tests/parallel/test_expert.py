"""Tokens travel to dealt experts and back: outputs and gradients are those of one process, however uneven."""

import pytest
import torch

from lamella.nn.shard import Exchange
from lamella.parallel.local import run_local
from tests.parallel import workers

COUNTS = {  # [rank][expert]
    "even": [[2, 2, 2, 2], [2, 2, 2, 2]],
    "uneven": [[5, 0, 1, 3], [0, 2, 7, 0]],
    "a rank without tokens": [[0, 0, 0, 0], [1, 3, 0, 4]],
    "a rank whose experts get none": [[3, 1, 0, 0], [2, 2, 0, 0]],
    "no tokens": [[0, 0], [0, 0]],
    "three ranks": [[1, 0, 4], [0, 0, 0], [3, 2, 0]],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_one_process(counts):
    outcomes = run_local(len(counts), workers.exchanged, counts, 5, timeout=120)
    assert [o.code for o in outcomes] == [0] * len(counts)
    dealt = torch.cat([o.value[2] for o in outcomes])
    weight = workers.expert_weights(len(counts[0]), 5).requires_grad_()

    inputs = workers.rows(counts, 5), workers.names(counts), workers.rows(counts, 6), counts, outcomes
    for x, where, grad, mine, outcome in zip(*inputs, strict=True):
        x.requires_grad_()
        y = Exchange().through(workers.tanh_experts(weight), x, where, torch.tensor(mine))
        y.backward(grad)
        for got, want in zip(outcome.value[:2], (y.detach(), x.grad), strict=True):
            assert torch.allclose(got, want, rtol=1e-13, atol=0)
    assert torch.allclose(dealt, weight.grad, rtol=1e-12, atol=1e-14)
