"""`lamella verify` passes what is equal and names what is not."""

import functools

import pytest

from lamella.config import load_run, parse_layout
from lamella.train import verify
from tests.train.faults import measure_with

RUN = "configs/run/quickstart.yaml"
# Everything a part can do that touches the layout, in one small stack.
RICH = [
    "model.parts.attention.rope_theta=10000.0",
    "model.parts.attention.qk_norm=true",
    "model.parts.attention.qkv_bias=true",
    "model.parts.attention.window=9",
    "model.parts.moe.shared_d_ff=64",
    "model.parts.mlp.activation=gelu",
    "model.tie_embeddings=true",
]
SWITCH = ["model.parts.moe.top_k=1", "model.parts.moe.capacity_factor=1.0"]
LAYOUTS = ["tensor=2", "tensor=2,sequence_parallel=true", "data=2"]


@functools.cache
def references(*overrides):
    return verify.References(load_run(RUN, overrides), 3)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_the_same_model(layout, micro_batches):
    wanted = parse_layout(layout)
    report = verify.compare(references().of(wanted), wanted, micro_batches)
    assert report.passed, report.verdict()
    assert references().of(wanted).moved() > 0.01
    kinds = {d.kind for d in report.differences}
    assert kinds == {"initial", "output", "loss", "norm", "gradient", "weight", "adam"}


@pytest.mark.parametrize("overrides", [RICH, SWITCH], ids=["rich", "switch"])
@pytest.mark.parametrize("layout", ["tensor=2,sequence_parallel=true", "tensor=2,data=2"])
def test_every_option_of_the_parts(layout, overrides):
    wanted = parse_layout(layout)
    report = verify.compare(references(*overrides).of(wanted), wanted, 2)
    assert report.passed, report.verdict()


FAULTS = [
    ("drop_x_proj_sum", "tensor=2", 1, "output", "layers.0.mixer"),
    ("draw_dt_bias_from_local_index", "tensor=2", 1, "initial", "layers.0.mixer.dt_proj.bias"),
    ("skip_norm_gradient_sum", "tensor=2,sequence_parallel=true", 1, "gradient", "layers.0.mixer_norm.weight"),
    ("average_losses_per_rank", "data=2", 1, "gradient", "embedding.weight"),
    ("aux_loss_per_micro_batch", "data=2", 4, "gradient", "layers.1.channel.router.weight"),
]


@pytest.mark.parametrize(("fault", "layout", "micro_batches", "kind", "name"), FAULTS, ids=[f[0] for f in FAULTS])
def test_planted_faults_are_caught_and_named(fault, layout, micro_batches, kind, name):
    wanted = parse_layout(layout)
    process = functools.partial(measure_with, fault)
    faulty = verify.References(load_run(RUN), 1, process=process)
    report = verify.compare(faulty.of(wanted), wanted, micro_batches, process=process)
    assert not report.passed
    assert not report.crash
    failed = {(d.kind, d.name) for d in report.failures}
    assert (kind, name) in failed, report.verdict()
    if kind != "gradient" or fault == "skip_norm_gradient_sum":
        first = next(d for d in report.failures if d.kind not in ("loss", "norm"))
        assert (first.kind, first.name) == (kind, name), report.verdict()


def test_a_rank_that_fails_is_no_pass():
    process = functools.partial(measure_with, "no_such_fault")
    wanted = parse_layout("data=2")
    report = verify.compare(references().of(wanted), wanted, 1, process=process)
    assert not report.passed
    assert "rank 0 ended with code 1" in report.verdict()
