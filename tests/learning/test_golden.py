"""Each mixer's loss is, step by step, what it was when it was recorded: no change of a mixer's function, gradient or
initial values goes unseen.

A change that is meant is recorded by `python -m tests.learning.golden`, and said in the commit.

The limits are for rounding, which differs between machines. Measured as the distance of 4 or 8 micro-batches a step
from one: in fp32 over 10 steps at most 7.6e-7 nats, and as much from the recorded fp64; in fp64 over 40 steps 8.1e-9
(RetNet; the others 5e-11, which is the digits recorded), over 80 steps 8.8e-10 (RWKV-7), but 1.7e-2 for RetNet and
3.5e-5 for RWKV-6, of which 40 are compared. A mixer's weights times 1.001 move the first ten losses by 1.2e-5 (RWKV-7,
whose outputs start at 0) to 2.8e-4.
"""

import json

import pytest
import torch

from tests.learning import golden
from tests.learning.nano import MIXERS

LIMIT_32, LIMIT_64 = 5e-6, 1e-6  # nats


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(case: str, steps: int, dtype: torch.dtype, limit: float) -> None:
    recorded = json.loads(golden.FILE.read_text())
    assert recorded["steps"] == list(golden.AT)
    losses = golden.curve(case, steps, dtype=dtype)
    apart = {at: abs(losses[at] - r) for at, r in zip(golden.AT, recorded["curves"][case], strict=True) if at < steps}
    assert max(apart.values()) < limit, apart


def test_a_small_change_is_seen():
    """Of one mixer's initial values, by a thousandth."""

    def scale(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mixer." in name:
                    parameter.mul_(1.001)

    plain, changed = (golden.curve("rwkv7", 10, dtype=torch.float32, change=c) for c in (None, scale))
    assert max(abs(a - b) for a, b in zip(plain, changed, strict=True)) > LIMIT_32


def test_every_mixer_has_a_curve():
    assert {case["mixer"] for case in golden.CASES.values()} == set(MIXERS)
    assert json.loads(golden.FILE.read_text())["curves"].keys() == golden.CASES.keys()


@pytest.mark.parametrize("case", golden.CASES)
def test_the_first_steps(case):
    """In fp32, as a run trains."""
    compare(case, 10, torch.float32, LIMIT_32)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", golden.CASES)
def test_the_curve(case):
    """In fp64, which keeps the rounding small."""
    compare(case, golden.SHORT.get(case, golden.STEPS), torch.float64, LIMIT_64)
