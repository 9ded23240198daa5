"""The learning rate's course, and which parameters decay."""

import pytest

from lamella.config import OptimizerConfig, ScheduleConfig, load_run
from lamella.model.lm import LanguageModel
from lamella.train.optimizer import learning_rate, make_optimizer


def rates(steps, **schedule):
    return [learning_rate(step, steps, 1.0, ScheduleConfig(**schedule)) for step in range(steps)]


def test_warm_up_reaches_the_peak():
    for kind in ("cosine", "constant"):
        assert rates(10, kind=kind, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_ends_at_its_minimum():
    course = rates(101, kind="cosine", warmup_steps=1, min_lr_ratio=0.1)
    assert course[-1] == pytest.approx(0.1)
    assert course[50] == pytest.approx(0.55)  # half-way
    assert course == sorted(course, reverse=True)


def test_wsd_is_stable_then_linear():
    course = rates(10, kind="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.0)
    assert course == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_constant_stays():
    assert rates(5, kind="constant") == [1.0] * 5


def test_matrices_decay_and_nothing_else():
    words = ["qkv_bias=true", "qk_norm=true"]
    run = load_run("configs/run/quickstart.yaml", [f"model.parts.attention.{word}" for word in words])
    model = LanguageModel(run.model)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, others = (
        {names[id(p)] for p in group["params"]}
        for group in make_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.3)).param_groups
    )
    assert decayed | others == set(names.values())
    assert not decayed & others
    assert {n.rsplit(".", 1)[-1] for n in decayed} == {"weight", "w_in", "w_out"}
    assert not [n for n in decayed if "norm" in n]
    kinds = ("norm", "bias", "A_log", ".D")
    assert [n for n in others if not any(kind in n for kind in kinds)] == []
