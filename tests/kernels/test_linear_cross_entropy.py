"""Head and loss in pieces, in plain torch, against whole logits."""

import pytest
import torch

from lamella_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_sum_exp, reference
from tests.kernels.building import assert_close, assert_gradients, source
from tests.nn.building import Largest


def make(dtype=torch.float64, time=33, channels=24, vocabulary=300):
    normal = source(0)
    shapes = {"x": (2, time, channels), "weight": (vocabulary, channels)}
    return {name: normal(*shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def targets(time=33, vocabulary=300):
    """Some below the vocabulary and some beyond, and the ends of pieces."""
    given = torch.randint(-3, vocabulary + 3, (2, time), generator=torch.Generator().manual_seed(5))
    given[0, :8] = torch.tensor([0, 127, 128, 255, 256, vocabulary - 1, vocabulary, -1])[:time]
    return given


def gradients(results, inputs):
    weights = [source(3)(*value.shape).to(value.dtype) for value in results]
    return dict(zip(inputs, torch.autograd.grad(results, list(inputs.values()), weights), strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-5)])
def test_equals_reference(dtype, limit):
    inputs, target = make(dtype), targets()
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    found = []
    for function, given in ((linear_log_sum_exp, inputs), (reference.linear_log_sum_exp, wide)):
        lse, picked = function(given["x"], given["weight"], target)
        found.append({"lse": lse, "picked": picked} | gradients((lse, picked), given))
    assert_close(*found, limit)


def test_gradcheck():
    def run(inputs):
        return linear_log_sum_exp(inputs["x"], inputs["weight"], targets(4, 130))[0], None

    assert_gradients(run, make(time=4, channels=3, vocabulary=130))


def test_loss_is_torch_cross_entropy():
    """Targets below 0 are none, and the z-loss is z lse^2."""
    inputs, target = make(), targets().clamp(max=299)
    assert (target < 0).any()
    ours = linear_cross_entropy(inputs["x"], inputs["weight"], target, z_loss=0.1)
    logits = inputs["x"] @ inputs["weight"].t()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target.clamp(min=0), reduction="none")
    theirs = (nats + 0.1 * logits.logsumexp(-1).square()) * (target >= 0)
    assert_close({"y": ours} | gradients((ours,), inputs), {"y": theirs} | gradients((theirs,), inputs), 1e-13)


def test_logits_are_never_whole():
    inputs, target = make(torch.float32, time=64, channels=4, vocabulary=6000), targets(64, 6000)
    with Largest() as made:
        linear_cross_entropy(inputs["x"], inputs["weight"], target).sum().backward()
    assert 0 < made.elements <= 2 * 64 * 6000 / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4).int()}, "x must be floating point"),
        ({"weight_VD": torch.ones(5, 3)}, "x needs .* and weight_VD"),
        ({"weight_VD": torch.ones(0, 4)}, "x needs .* and weight_VD"),
        ({"target": torch.zeros(2)}, "target must be int32 or int64"),
        ({"target": torch.zeros(3).long()}, "target needs shape"),
        ({"weight_VD": torch.ones(5, 4, device="meta")}, "are on cpu, meta, cpu"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=f"linear_log_sum_exp: .*{message}"):
        plain = {"x": torch.ones(2, 4), "weight_VD": torch.ones(5, 4), "target": torch.zeros(2).long()}
        linear_log_sum_exp(**plain | change)
