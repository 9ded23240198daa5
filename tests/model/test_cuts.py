"""Cuts of the stack against every possible one, by hand, and for stacks whose layers cost unequally."""

import itertools
import math
import random

import pytest

from lamella.config import change, load_run
from lamella.errors import UserError
from lamella.model.count import count
from lamella.model.cuts import (
    RATES,
    Costs,
    check_cuts,
    cut,
    imbalance,
    layer_costs,
    rank_imbalance,
    stage_costs,
)
from lamella.model.stack import plan_layers

RUN = "configs/run/quickstart.yaml"


def config(*overrides):
    return load_run(RUN, overrides).model


def largest(costs, starts):
    return max(stage_costs(costs, starts))


def equal_counts(layers, stages):
    return tuple(i * layers // stages for i in range(1, stages))


def every_cut(layers, stages):
    return itertools.combinations(range(1, layers), stages - 1)


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_is_better(seed):
    """Whole numbers make ties, the others none; the order of preference is the docstring's."""
    random_ = random.Random(seed)
    layers = random_.randint(1, 9)
    draw = (lambda: float(random_.randint(0, 4))) if seed % 2 else (lambda: random_.random() ** 3)
    costs = Costs(tuple(draw() for _ in range(layers)), draw(), 2 * draw())
    for stages in range(1, layers + 1):

        def preference(starts):
            by_stage = stage_costs(costs, starts)
            return sorted(by_stage, reverse=True), by_stage[::-1]

        got = cut(costs, stages)
        check_cuts(got, stages, layers)
        assert preference(got) == min(map(preference, every_cut(layers, stages)))
        assert got == cut(costs, stages)


@pytest.mark.parametrize(
    "layers, embedding, head, stages, starts",
    [
        ([1, 1, 1, 1], 0, 0, 1, ()),
        ([1, 1, 1, 1], 0, 0, 2, (2,)),
        ([1, 1, 1, 1], 0, 0, 4, (1, 2, 3)),
        ([1, 1, 1, 1, 1], 0, 0, 2, (3,)),  # the later stage is the lighter
        ([1] * 10, 0, 0, 4, (3, 6, 8)),  # 3 3 2 2, not 3 3 3 1
        ([1, 1, 1, 1], 0, 2, 2, (3,)),  # the head weighs on the last stage
        ([1, 1, 1, 1], 2, 0, 2, (1,)),  # the embedding on the first
        ([9, 1, 1, 1, 1], 0, 0, 3, (1, 3)),  # below the largest stage the others are even
        ([1, 1, 1, 9, 1, 1], 0, 0, 3, (3, 4)),
        ([0.1, 0.2, 0.3, 0.3, 0.2, 0.1], 0, 0, 2, (3,)),
    ],
)
def test_by_hand(layers, embedding, head, stages, starts):
    assert cut(Costs(tuple(layers), embedding, head), stages) == starts


def test_imbalance_by_hand():
    costs = Costs((1, 2, 3, 4), 1, 1)
    assert stage_costs(costs, (2, 3)) == (4, 3, 5)
    assert imbalance(costs, (2, 3)) == pytest.approx(5 / 4)
    assert imbalance(costs, ()) == 1
    assert stage_costs(costs, (1, 2, 3)) == (2, 2, 3, 5)
    assert rank_imbalance(costs, (1, 2, 3), (0, 1, 0, 1)) == pytest.approx(7 / 6)  # interleaved
    assert rank_imbalance(costs, (1, 2, 3), (0, 1, 1, 0)) == pytest.approx(7 / 6)  # V-shaped
    assert rank_imbalance(costs, (1, 2, 3), (0, 1, 2, 3)) == imbalance(costs, (1, 2, 3))


def test_costs_are_the_parts_work_at_their_rates():
    model, length = config(), 256
    costs, counted = layer_costs(model, length), count(model, length).forward
    logits, values = length * model.vocab_size, length * model.d_model
    wanted = {"matmul": counted.matmul, "scores": counted.scores, "scan": counted.scan, "loss": logits}
    wanted["embedding"] = values
    total = math.fsum(n * sum(RATES[kind]) for kind, n in wanted.items())
    assert math.fsum((*costs.layers, costs.embedding, costs.head)) == pytest.approx(total, rel=1e-12)
    assert costs.layers[1] == costs.layers[3] != costs.layers[0]  # mamba/moe twice
    assert 0 < costs.embedding < costs.head / 20
    assert costs.head == 2 * logits * model.d_model * sum(RATES["matmul"]) + logits * sum(RATES["loss"])


def test_other_rates():
    free = dict.fromkeys(RATES, (0.0, 0.0))
    model = config("model.stack=[{layers: [mamba/-, attention/-, -/mlp]}]")
    scan = layer_costs(model, 64, rates=free | {"scan": (1.0, 0.0)})
    assert scan.layers[0] > 0 == scan.layers[1] == scan.layers[2] == scan.embedding == scan.head


def test_what_is_recomputed_runs_forward_twice():
    model, length = config("model.stack=[{layers: [-/mlp, mamba/mlp, attention/moe]}]"), 64
    none, selective, full = (layer_costs(model, length, how) for how in ("none", "selective", "full"))
    forward = layer_costs(model, length, rates={kind: (rate, 0) for kind, (rate, _) in RATES.items()})
    assert full.layers == pytest.approx([a + b for a, b in zip(none.layers, forward.layers, strict=True)])
    assert selective.layers[0] == none.layers[0]  # matmuls alone
    mamba, attention = (p.mixer.flops(model.d_model, length) for p in plan_layers(model) if p.mixer is not None)
    assert selective.layers[1] - none.layers[1] == pytest.approx(mamba.scan * RATES["scan"][0])
    assert selective.layers[2] - none.layers[2] == pytest.approx(attention.scores * RATES["scores"][0])
    assert {(c.head, c.embedding) for c in (none, selective, full)} == {(none.head, none.embedding)}


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6, 8, 12, 16])
@pytest.mark.parametrize("length", [4096, 262144])
def test_jamba_is_never_worse_than_equal_counts(stages, length):
    costs = layer_costs(config("model=jamba-v0.1"), length)
    starts = cut(costs, stages)
    assert largest(costs, starts) <= largest(costs, equal_counts(32, stages))
    assert len(starts) == stages - 1 and imbalance(costs, starts) >= 1


def test_an_unequal_stack_is_cut_better_than_into_equal_counts():
    """Every second layer's experts and a long document's attention: equal counts put two heavy ones together."""
    for stages, gain in ((5, 1.05), (12, 1.2)):
        costs = layer_costs(config("model=jamba-v0.1"), 262144)
        starts, counts = cut(costs, stages), equal_counts(32, stages)
        assert largest(costs, counts) > gain * largest(costs, starts)
        assert imbalance(costs, starts) < imbalance(costs, counts)
    jamba = config("model=jamba-v0.1")
    light_head, heavy_head = (layer_costs(change(jamba, vocab_size=v), 4096) for v in (65536, 1 << 20))
    assert cut(heavy_head, 4)[-1] > cut(light_head, 4)[-1]


def test_jamba_large_is_cut_at_once():
    """Equal costs do not slow it: 72 layers, as many stages as half of them."""
    costs = layer_costs(config("model=jamba-1.5-large"), 4096)
    assert len(cut(costs, 36)) == 35
    assert imbalance(costs, cut(costs, 9)) < 1.1


@pytest.mark.parametrize(
    "starts, stages, words",
    [
        ((), 33, ["33 pipeline stages for 32 layers", "choose 32 or fewer"]),
        ((8, 16), 4, ["cuts=[8, 16] names 2", "4 stages need 3", "for example [8, 16, 24]"]),
        ((8, 16, 24, 28), 4, ["names 4", "need 3"]),
        ((0, 8, 16), 4, ["cannot begin at layer 0", "1 to 31", "for example [8, 16, 24]"]),
        ((8, 16, 32), 4, ["cannot begin at layer 32", "of 32 layers"]),
        ((-8, 8, 16), 4, ["cannot begin at layer -8"]),
        ((16, 8, 24), 4, ["[16, 8, 24] must increase", "did you mean [8, 16, 24]?"]),
        ((8, 8, 24), 4, ["must increase", "at least one layer", "for example [8, 16, 24]"]),
        ((5,), 1, ["names 1", "1 stages need 0"]),
    ],
)
def test_wrong_cuts_are_one_clear_line(starts, stages, words):
    with pytest.raises(UserError) as caught:
        check_cuts(starts, stages, 32)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert [word for word in words if word not in message] == []


def test_right_cuts_pass():
    check_cuts((), 1, 1)
    check_cuts((1, 2, 31), 4, 32)


def test_more_stages_than_layers():
    with pytest.raises(UserError, match="5 pipeline stages for 4 layers"):
        cut(layer_costs(config(), 64), 5)
    with pytest.raises(UserError, match="must increase"):
        imbalance(Costs((1, 1, 1), 0, 0), (2, 1))
