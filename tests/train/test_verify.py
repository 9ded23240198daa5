"""`lamella verify` passes what is equal and names what is not."""

import functools
import json
from typing import get_args

import pytest

from lamella.config import LayoutConfig, load_run, parse_layout
from lamella.nn.rows import Recompute
from lamella.train import matrix, verify
from lamella.train.measure import measure
from lamella.train.reference import References
from tests.commands import call
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
def references(*overrides, precision="fp32"):
    return References(load_run(RUN, overrides), 3, precision=precision)


def some_micro_batches(layout):
    return 8 if layout.pipeline > 1 else 2


def assert_equal(layout, *overrides, micro_batches=None, precision="fp32"):
    """Compares the layout with one process. Returns the report."""
    wanted = parse_layout(layout) if isinstance(layout, str) else layout
    reference = references(*overrides, precision=precision).of(wanted)
    report = verify.compare(reference, wanted, micro_batches or some_micro_batches(wanted))
    assert report.passed, report.verdict()
    return report


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_the_same_model(layout, micro_batches):
    report = assert_equal(layout, micro_batches=micro_batches)
    assert references().of(parse_layout(layout)).moved() > 0.01
    kinds = {d.kind for d in report.differences}
    assert kinds == {"initial", "output", "loss", "norm", "gradient", "weight", "adam"}


@pytest.mark.parametrize("overrides", [RICH, SWITCH], ids=["rich", "switch"])
@pytest.mark.parametrize("layout", ["tensor=2,sequence_parallel=true", "tensor=2,data=2"])
def test_every_option_of_the_parts(layout, overrides):
    assert_equal(layout, *overrides)


# Each dimension, each schedule, and the pairs that share code.
SPANNING = [
    "tensor=4",
    "pipeline=2,schedule=gpipe",
    "pipeline=2,schedule=1f1b",
    "pipeline=2,schedule=interleaved",
    "pipeline=2,schedule=zbv",
    "pipeline=2,cuts=[1]",
    "pipeline=4",
    "expert=2",
    "tensor=2,expert=2",
    "pipeline=2,expert=2",
    "data=2,zero=2",
    "data=2,zero=3",
    "data=2,offload_optimizer=true",
    "tensor=2,pipeline=2,data=2",
    "tensor=2,sequence_parallel=true,recompute=full",
    "pipeline=2,recompute=selective",
    "data=1,logits=pieces",
    "tensor=2,sequence_parallel=true,pipeline=2,logits=pieces",
]


@pytest.mark.parametrize("layout", SPANNING)
def test_spanning_layouts(layout):
    assert_equal(layout)


# A tied weight at both ends of a pipeline, or (zbv) at one; values that the first layer hands on to the third.
TIED = [
    "model.tie_embeddings=true",
    "model.parts.attention.value_residual=true",
    "model.stack=[{layers: [attention/mlp, mamba/moe]}]",
]
ENDS = [
    "pipeline=2",
    "pipeline=2,schedule=zbv,logits=pieces",
    "tensor=2,sequence_parallel=true,pipeline=2,recompute=full",
]


@pytest.mark.parametrize("layout", ENDS)
def test_tied_embeddings_and_carried_values(layout):
    assert_equal(layout, *TIED)


@pytest.mark.parametrize("layout", ["data=2", "tensor=2", "pipeline=2,schedule=zbv"])
def test_bf16_is_as_far_from_fp32_as_one_process_in_bf16(layout):
    report = assert_equal(layout, precision="bf16")
    assert report.worst("gradient").error > 1e-3  # it did compute in bf16


ALL = matrix.every_layout(load_run(RUN), 8)


@pytest.mark.full
@pytest.mark.parametrize("layout", ALL, ids=lambda layout: verify.Report(layout, 0, []).name().split(", ")[0])
def test_every_layout(layout):
    for count in verify.micro_batch_counts(layout):
        assert_equal(layout, micro_batches=count)


SIZES = [1, 2, 4, 8]
DIMENSIONS = {
    "tensor": SIZES,
    "sequence_parallel": [False, True],
    "pipeline": SIZES,
    "schedule": list(matrix.SCHEDULES),
    "expert": SIZES,
    "data": SIZES,
    "zero": [1, 2, 3],
}


def test_every_layout_has_every_dimension_and_kind():
    assert {verify.processes(layout) for layout in ALL} == set(SIZES)
    keys = [layout.model_dump_json(exclude={"recompute", "offload_optimizer", "logits"}) for layout in ALL]
    assert len(set(keys)) == len(keys)
    run = load_run(RUN)
    assert all(matrix.legal(run, layout, verify.processes(layout)) for layout in ALL)
    for name, values in DIMENSIONS.items():
        with_name = [layout for layout in ALL if name != "schedule" or layout.pipeline > 1]
        assert sorted({getattr(layout, name) for layout in with_name}) == sorted(values)
        for value in values:
            some = [layout for layout in with_name if getattr(layout, name) == value]
            if len(some) < 2:
                continue  # one process
            assert {layout.recompute for layout in some} == set(get_args(Recompute)), (name, value)
            assert {layout.offload_optimizer for layout in some} == {False, True}, (name, value)
            assert {layout.logits for layout in some} == {"whole", "pieces"}, (name, value)
    pairs = {(a.schedule, a.expert > 1, a.tensor > 1, a.data > 1) for a in ALL if a.pipeline > 1}
    assert len(pairs) == 4 * (2 * 2 * 2 - 1)  # experts are dealt over tensor x data: not where both are 1


def test_every_layout_leaves_out_what_the_run_cannot_have():
    dense = load_run(RUN, ["model.stack=[{layers: [mamba/mlp]}]"])
    found = matrix.every_layout(dense, 3)
    assert {verify.processes(layout) for layout in found} == {1, 2, 3}
    assert {layout.expert for layout in found} == {1}


def test_json_is_one_object_a_line(capfd):
    layouts = [word for layout in ("data=2", "recompute=full") for word in ("--layout", layout)]
    assert call("verify", RUN, *layouts, "--steps", 1, "--json") == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(one["processes"], one["micro_batches"]) for one in found] == [(2, 1), (2, 4), (1, 1), (1, 4)]
    for one in found:
        assert one["passed"] and one["verdict"] == "equal"
        assert LayoutConfig(**one["layout"]).recompute in ("none", "full")
        assert {d["kind"] for d in one["differences"]} == set(verify.LIMITS)
        assert all(d["error"] <= d["limit"] for d in one["differences"])


SEQUENCE = "tensor=2,sequence_parallel=true"
DENSE = ["model.stack=[{layers: [mamba/mlp, attention/mlp]}]"]
DT_BIAS, EXPERTS = "layers.{}.mixer.dt_proj.bias", "layers.{}.channel.experts.w_{}"
EMBEDDING, HEAD, FIRST, LAST = "embedding.weight", "head.weight", "layers.0.mixer", "layers.3.channel"
# Fault, layout and overrides; the first kind that differs, the first and the last name of that kind that do. Backward
# comes to a gradient's last name first: there the fault is.
FAULTS = [
    ("drop_x_proj_sum", "tensor=2", [], "output", FIRST, LAST),
    ("draw_dt_bias_from_local_index", "tensor=2", [], "initial", DT_BIAS.format(0), DT_BIAS.format(3)),
    ("skip_norm_gradient_sum", SEQUENCE, [], "gradient", "layers.0.mixer_norm.weight", "norm.weight"),
    ("average_losses_per_rank", "data=2", [], "gradient", EMBEDDING, HEAD),
    ("aux_loss_per_micro_batch", "data=2", [], "gradient", EMBEDDING, "layers.3.channel.router.weight"),
    ("leave_the_tied_ends_apart", "pipeline=2", TIED[:1], "gradient", EMBEDDING, EMBEDDING),
    ("divide_by_the_micro_batches", "pipeline=2", [], "gradient", EMBEDDING, HEAD),
    ("keep_the_queue", "pipeline=2,schedule=zbv", [], "gradient", "layers.0.mixer.in_proj.weight", HEAD),
    ("cut_the_carried_values", "pipeline=2", TIED[1:], "gradient", EMBEDDING, "layers.0.mixer.qkv.weight"),
    ("lose_losses_before_the_last_stage", "pipeline=2", [], "gradient", EMBEDDING, "layers.1.channel.router.weight"),
    ("send_every_token_twice", "tensor=2,expert=2", [], "output", "layers.1.channel", LAST),
    ("answer_in_the_order_of_the_question", "expert=2", [], "output", "layers.1.channel", LAST),
    ("take_dealt_experts_for_copies", "expert=2", [], "initial", EXPERTS.format(1, "in"), EXPERTS.format(3, "out")),
    ("count_replicas_in_the_norm", "tensor=2", [], "norm", "", ""),
    ("keep_the_last_micro_batch", "data=2,zero=3", [], "gradient", EMBEDDING, HEAD),
    ("draw_anew", "recompute=full", DENSE, "gradient", EMBEDDING, "layers.1.channel.w_out.weight"),
    ("record_repeated_forwards", "recompute=full", [], "output", FIRST, LAST),
]
IN_ONE_PROCESS = ("aux_loss_per_micro_batch",)  # it changes what one process computes, too
ORDER = ("initial", "output", "loss", "gradient", "norm", "weight", "adam")  # of the computation


@functools.cache
def one_step(process, *overrides):
    return References(load_run(RUN, overrides), 1, process=process)


@pytest.mark.parametrize(("fault", "layout", "overrides", "kind", "first", "last"), FAULTS, ids=[f[0] for f in FAULTS])
def test_planted_faults_are_caught_and_named(fault, layout, overrides, kind, first, last):
    wanted, process = parse_layout(layout), functools.partial(measure_with, fault)
    reference = one_step(process if fault in IN_ONE_PROCESS else measure, *overrides).of(wanted)
    report = verify.compare(reference, wanted, some_micro_batches(wanted), process=process)
    assert not report.passed
    assert not report.crash
    names = {known: [d.name for d in report.failures if d.kind == known] for known in ORDER}
    earliest = next(known for known in ORDER if names[known])
    assert (earliest, names[earliest][0], names[earliest][-1]) == (kind, first, last), report.verdict()


def test_a_rank_that_fails_is_no_pass():
    process = functools.partial(measure_with, "no_such_fault")
    wanted = parse_layout("data=2")
    report = verify.compare(references().of(wanted), wanted, 1, process=process)
    assert not report.passed
    assert "rank 0 ended with code 1" in report.verdict()
