"""Head and loss in pieces against whole logits."""

import pytest
import torch

from lamella_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_sum_exp, reference
from tests.kernels.gpu.building import (
    LIMITS,
    assert_compiles,
    assert_exact,
    assert_operator,
    between_fences,
    numbers,
)


def make(time=33, channels=24, vocabulary=300, dtype=torch.float32, weight=None):
    return {"x": numbers(dtype)(2, time, channels), "weight": numbers(weight or dtype, 1)(vocabulary, channels)}


def targets(time=33, vocabulary=300):
    """Some below the vocabulary and some beyond, and the ends of pieces."""
    given = torch.randint(-3, vocabulary + 3, (2, time), generator=torch.Generator().manual_seed(5))
    ends = torch.tensor([0, 127, 128, 255, 256, vocabulary - 1, vocabulary, -1])[:time]
    given[0, : len(ends)] = ends
    return between_fences(given)


def forms(target):
    def ours(inputs):
        return linear_log_sum_exp(inputs["x"], inputs["weight"], target)

    def theirs(inputs):
        return reference.linear_log_sum_exp(inputs["x"], inputs["weight"], target)

    return ours, theirs


@pytest.mark.parametrize("vocabulary", [7, 300])
@pytest.mark.parametrize("time", [1, 33])
def test_equals_reference(time, vocabulary, fenced):
    given = targets(time, vocabulary)
    assert_exact(*forms(given), make(time, vocabulary=vocabulary), LIMITS[torch.float32])
    assert_exact(*forms(given.int()), make(time, vocabulary=vocabulary), LIMITS[torch.float32])


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("time", "vocabulary"), [(63, 128), (257, 1000), (20, 40000)])
def test_lengths_and_types(time, vocabulary, dtype, fenced):
    inputs = make(time, 16, vocabulary, dtype, weight=torch.float32 if time == 63 else None)
    assert_exact(*forms(targets(time, vocabulary)), inputs, _limit(dtype))


def test_bfloat16(fenced):
    found = assert_exact(*forms(targets()), make(dtype=torch.bfloat16), _limit(torch.bfloat16))
    assert {name: value.dtype for name, value in found.items()} == {
        "out0": torch.float32, "out1": torch.float32, "x": torch.bfloat16, "weight": torch.bfloat16
    }  # fmt: skip


def _limit(dtype):
    """Logits are rounded to a half dtype too, and a gradient is as wrong as its exponential."""
    return LIMITS[dtype] if dtype == torch.float32 else 4 * LIMITS[dtype]


def test_logits_far_out():
    """Largest and smallest logits of hundreds, in every order over the pieces."""
    weight = torch.linspace(-40, 40, 300)[:, None] * torch.ones(4)
    inputs = {"weight": between_fences(weight).requires_grad_()}
    inputs["x"] = between_fences(torch.tensor([[[3.0] * 4, [-3.0] * 4, [0.0] * 4]]).expand(2, 3, 4)).requires_grad_()
    assert_exact(*forms(targets(3)), inputs, LIMITS[torch.float32])


def test_loss():
    """Against torch's cross entropy; targets below 0 are none; the z-loss is z lse^2."""
    target, inputs = targets().clamp(max=299), make()

    def ours(inputs):
        return linear_cross_entropy(inputs["x"], inputs["weight"], target, z_loss=0.1)

    def theirs(inputs):
        logits = inputs["x"] @ inputs["weight"].t()
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target.clamp(min=0), reduction="none")
        return (nats + 0.1 * logits.logsumexp(-1).square()) * (target >= 0)

    assert (target < 0).any()
    assert_exact(ours, theirs, inputs, LIMITS[torch.float32])


def test_parts_of_the_vocabulary():
    """Three ranks' rows of the weight: their parts add up to the whole loss and its gradients."""
    target, inputs = targets().clamp(0, 299), make()

    def ours(inputs):
        parts, start = [], 0
        for weight in inputs["weight"].split([100, 130, 70]):
            parts.append(linear_log_sum_exp(inputs["x"], weight, target - start))
            start += len(weight)
        lse, picked = (torch.stack(part) for part in zip(*parts, strict=True))
        return lse.logsumexp(0) - picked.sum(0)

    def theirs(inputs):
        lse, picked = reference.linear_log_sum_exp(inputs["x"], inputs["weight"], target)
        return lse - picked

    assert_exact(ours, theirs, inputs, LIMITS[torch.float32])


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_some_gradients(index, frozen):
    inputs = make(5)
    inputs[frozen].requires_grad_(False)
    run, judge = (lambda given, form=form: form(given)[index] for form in forms(targets(5)))
    assert_exact(run, judge, inputs, LIMITS[torch.float32])


def test_operator():
    assert_operator(forms(targets(5))[0], make(5), ["linear_log_sum_exp", "linear_log_sum_exp_backward"])


def test_torch_compile():
    assert_compiles(forms(targets(5))[0], make(5))
