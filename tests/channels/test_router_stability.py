"""The rich get richer: an expert that starts a little ahead ends with every token, unless its load is balanced.

Every token is to be mapped by one and the same function, so that the best expert is the best for all of them: the one
that sees more tokens learns it sooner, and the router then prefers it. Each of the three methods has to hold against
that: the loss a row (Shazeer et al. 2017, Switch), the loss against the last step's loads, the bias (arXiv 2408.15664).
"""

import math

import pytest
import torch

from lamella.channels.moe import Config
from lamella.config import ModelConfig, check_options
from lamella.nn.record import Record
from lamella.nn.shard import Whole
from lamella.train.balance import Balance
from tests.nn.building import filled, noise, packed

D_MODEL, EXPERTS, STEPS, ROWS, LENGTH = 8, 4, 200, 8, 32
METHODS = {
    "none": {},
    "aux_loss": {"aux_loss": 0.1},
    "global_aux_loss": {"global_aux_loss": 0.1},
    "bias_rate": {"bias_rate": 0.02},
}


def loads(method: dict, seed: int, steps: int = STEPS) -> torch.Tensor:
    """The share of the tokens that each expert got, step by step: [steps, E]."""
    options = {"channel": "moe", "num_experts": EXPERTS, "top_k": 1, "d_ff": 16, "aux_loss": 0.0} | method
    config = check_options(Config, options, "moe")
    moe = filled(config.build(D_MODEL, Whole(), "layer0/channel"), seed, spread=0.2)
    tree = {"d_model": D_MODEL, "vocab_size": 8, "parts": {"moe": options}, "stack": [{"layers": ["-/moe"]}]}
    balance = Balance(ModelConfig.model_validate(tree, strict=False), moe)
    mean = noise(D_MODEL, seed=seed, dtype=torch.float32)
    x = noise(ROWS, LENGTH, D_MODEL, seed=seed + 100, dtype=torch.float32) + mean
    with torch.no_grad():
        moe.router.weight -= torch.outer(moe.router.weight @ mean, mean) / (mean @ mean)  # even loads
        moe.router.weight[0] += 0.2 * mean / (mean @ mean)  # a little ahead
    targets = torch.tanh(x @ noise(D_MODEL, D_MODEL, seed=seed + 200, dtype=torch.float32))
    optimizer, found = torch.optim.Adam(moe.parameters(), lr=0.01), []
    for _ in range(steps):
        record = Record()
        rows = packed([[LENGTH]] * ROWS, loss_scale=1 / ROWS, record=record)
        (moe(x, rows) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.update(record.values)
        load = record.values["layer0/channel/load"]
        found.append(load / load.sum())
    return torch.stack(found)


def evenness(share: torch.Tensor) -> float:
    """The entropy of the loads over that of even ones."""
    return float(-(share * share.clamp(min=1e-12).log()).sum() / math.log(EXPERTS))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_an_expert_ahead_takes_all_only_without_balancing(method, seed):
    share = loads(METHODS[method], seed)
    assert float(share[0].max()) < 0.5 and evenness(share[0]) > 0.85
    last = share[-20:].mean(0)
    if method == "none":
        assert float(last.max()) > 0.8 and evenness(last) < 0.5
    else:
        assert float(last.max()) < 0.4 and evenness(last) > 0.95
