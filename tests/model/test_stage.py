"""What travels between a pipeline's stages beside the stream."""

import pytest

from lamella.config import load_run
from lamella.model.stage import carried_into, make_stages

ATTENTION = "mixer: attention, num_heads: 2, num_kv_heads: 1"
PARTS = [
    "model.d_model=12",
    f"model.parts.attention={{{ATTENTION}}}",
    f"model.parts.residual={{{ATTENTION}, value_residual: true}}",
]


def config_for(*mixers):
    layers = ", ".join(f"{mixer}/mlp" for mixer in mixers)
    return load_run("configs/run/quickstart.yaml", [*PARTS, f"model.stack=[{{layers: [{layers}]}}]"]).model


@pytest.mark.parametrize(
    ("mixers", "into"),
    [
        (["attention", "residual", "mamba", "residual", "mamba"], [0, 0, 1, 1, 0]),
        (["residual", "mamba", "mamba", "residual"], [0, 1, 1, 1]),
        (["residual", "mamba", "mamba"], [0, 0, 0]),
        (["mamba", "attention"], [0, 0]),
    ],
)
def test_values_travel_from_the_first_layer_that_makes_them_to_the_last_that_reads(mixers, into):
    config, number = config_for(*mixers), len(mixers)
    stages = make_stages(tuple(range(1, number)), number)
    values = {"attention_values": 6}  # one key-value head
    assert [carried_into(config, stage) for stage in stages] == [values if there else {} for there in into]


def test_stages_hold_every_layer_once():
    stages = make_stages((1, 4), 6)
    assert [list(stage.layers) for stage in stages] == [[0], [1, 2, 3], [4, 5]]
    assert [(stage.first, stage.last) for stage in stages] == [(True, False), (False, False), (False, True)]
    (alone,) = make_stages((), 6)
    assert alone.first and alone.last and list(alone.layers) == list(range(6))
