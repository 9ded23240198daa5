"""A layout deals rows and stages, each once, whatever the sizes; what does not fit is refused in one line."""

import pytest

from lamella.config import load_run
from lamella.errors import UserError
from lamella.parallel import local
from lamella.parallel.layout import resolve
from tests.parallel import workers

RUN = "configs/run/quickstart.yaml"
SIZES = ["train.global_batch_size=16", "layout.micro_batch=1"]


def run_with(*words):
    """The quickstart of 16 rows a step; a word without a group is the layout's."""
    return load_run(RUN, SIZES + [w if w.startswith(("model.", "train.")) else f"layout.{w}" for w in words])


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, []),
        (2, []),
        (4, ["tensor=2"]),
        (8, ["tensor=2", "micro_batch=2"]),
        (4, ["tensor=4", "sequence_parallel=true"]),
        (8, ["tensor=2", "pipeline=2", "expert=4"]),
    ],
)
def test_every_row_once(world, words):
    # Heads and widths that four ranks divide.
    heads = ["model.parts.attention.num_heads=8", "model.parts.attention.num_kv_heads=4"]
    layout = resolve(run_with(*words, *heads), world)
    assert layout.world == world
    pieces = layout.micro_batches(list(range(16 // layout.data)))
    assert [row for rows in pieces for row in rows] == list(range(16 // layout.data))
    assert {len(rows) for rows in pieces} == {layout.micro_batch} and len(pieces) == layout.micro_batch_count


def test_the_processes_decide_the_data_size():
    assert [resolve(run_with(), world).data for world in (1, 2, 4)] == [1, 2, 4]
    assert [resolve(run_with("tensor=2", "pipeline=2"), world).data for world in (4, 8)] == [1, 2]
    assert not resolve(load_run(RUN, ["layout.sequence_parallel=true"]), 1).sequence_parallel


DEEP = "model.stack=[{layers: [mamba/mlp, attention/moe], repeat: 6}]"
RANKS = {  # of the stages in their order
    "gpipe": [0, 1, 2],
    "1f1b": [0, 1, 2],
    "interleaved": [0, 1, 2, 0, 1, 2],
    "zbv": [0, 1, 2, 2, 1, 0],
}


@pytest.mark.parametrize("schedule", RANKS)
def test_who_holds_which_stage(schedule):
    layout = resolve(run_with("pipeline=3", f"schedule={schedule}", "train.global_batch_size=18", DEEP), 3)
    ranks = RANKS[schedule]
    assert [layout.rank_of(stage.index) for stage in layout.stages] == ranks
    for rank in range(3):
        assert [stage.index for stage in layout.stages_of(rank)] == [i for i, r in enumerate(ranks) if r == rank]
    assert [index for stage in layout.stages for index in stage.layers] == list(range(12))
    assert all(stage.layers for stage in layout.stages)
    assert [(stage.index, stage.count) for stage in layout.stages] == [(i, len(ranks)) for i in range(len(ranks))]
    assert [stage.first for stage in layout.stages].count(True) == 1 and layout.stages[0].first
    assert [stage.last for stage in layout.stages].count(True) == 1 and layout.stages[-1].last


def test_stages_by_hand():
    words = ["pipeline=2", "schedule=interleaved", "stages_per_rank=3", "cuts=[1,2,6,7,11]", DEEP]
    layout = resolve(run_with(*words), 2)
    assert [list(stage.layers) for stage in layout.stages] == [[0], [1], [2, 3, 4, 5], [6], [7, 8, 9, 10], [11]]
    assert [stage.index for stage in layout.stages_of(1)] == [1, 3, 5]


def test_groups_are_made_of_the_ranks_that_the_layout_says():
    """r = t + tensor * (d + data * p); experts are dealt to neighbours of one pipeline rank."""
    run = run_with("tensor=2", "pipeline=2", "expert=2")
    groups = [o.value for o in local.run_local(8, workers.neighbours, run, timeout=120)]
    for rank, group in enumerate(groups):
        t, d, p = rank % 2, rank // 2 % 2, rank // 4
        assert group["tensor"] == [2 * (d + 2 * p), 2 * (d + 2 * p) + 1]
        assert group["data"] == [t + 4 * p, t + 2 + 4 * p]
        assert group["pipeline"] == [t + 2 * d, t + 2 * d + 4]
        assert group["model"] == [2 * d, 2 * d + 1, 2 * d + 4, 2 * d + 5]
        assert group["expert"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert group["expert_data"] == [rank % 2 + 4 * p, rank % 2 + 2 + 4 * p]
    wide = run_with("tensor=2", "expert=4")
    groups = [o.value for o in local.run_local(4, workers.neighbours, wide, timeout=120)]
    assert [group["expert"] for group in groups] == [[0, 1, 2, 3]] * 4
    assert [group["expert_data"] for group in groups] == [[rank] for rank in range(4)]


PIPELINE = ["pipeline=2", "schedule=interleaved"]
REFUSED = [
    (3, ["tensor=2"], "tensor=2 does not divide 3 processes; start a multiple of 2"),
    (6, ["tensor=2", "pipeline=2"], "tensor=2 x pipeline=2 does not divide 6 processes; start a multiple of 4"),
    (2, ["data=8"], "tensor=1 x data=8 needs 8 processes, there are 2; start as many, or leave layout.data out"),
    (8, ["tensor=2", "pipeline=2", "data=1"], "tensor=2 x pipeline=2 x data=1 needs 4 processes, there are 8; start"),
    (3, [], "batch_size=16 cannot be dealt to data=3 ranks in micro-batches of 1 rows; the nearest that can is 15"),
    (2, ["micro_batch=5"], "data=2 ranks in micro-batches of 5 rows; the nearest that can is 20"),
    (2, ["micro_batch=99"], "the nearest that can is 198"),
    (
        2,
        ["tensor=2", "sequence_parallel=true", "train.sequence_length=63"],
        "splits train.sequence_length=63 over tensor=2; the nearest length that divides is 64",
    ),
    (
        2,
        ["expert=2", "model.stack=[{layers: [mamba/mlp]}]"],
        "expert=2, but the stack has no mixture of experts; leave expert out",
    ),
    (4, ["expert=3"], "expert=3 does not divide tensor=1 x data=4; the nearest that does is 2"),
    (4, ["tensor=2", "expert=8"], "expert=8 does not divide tensor=2 x data=2; the nearest that does is 4"),
    (2, ["pipeline=2", "expert=2"], "expert=2 does not divide tensor=1 x data=1; the nearest that does is 1"),
    (4, ["expert=4", "model.parts.moe.num_experts=6"], "6 cannot be split over expert=4; choose a divisor of 6"),
    (4, ["pipeline=2", "zero=2"], "zero=2 splits gradients between the micro-batches of a pipeline, .* take zero=1"),
    (4, ["pipeline=2", "zero=3"], "zero=3 splits gradients .* with pipeline > 1 take zero=1"),
    (2, ["expert=2", "zero=3"], "zero=3 does not split dealt experts .*; take zero=2, or expert=1"),
    (4, ["tensor=4"], "num_kv_heads=2 cannot be split over tensor=4; choose a divisor"),
    (3, ["tensor=3"], "a width of 4096 cannot be split over tensor=3; choose a divisor of 4096"),
    (
        2,
        ["pipeline=2", "micro_batch=16"],
        "schedule=1f1b needs at least pipeline=2 micro-batches a step, there are 1; make micro_batch smaller or",
    ),
    (2, [*PIPELINE, "micro_batch=16"], "interleaved needs at least pipeline=2 micro-batches a step, there are 1"),
    (
        2,
        [*PIPELINE, "train.global_batch_size=5"],
        "interleaved wants rounds of pipeline=2 micro-batches or of equally more, not 5 of them; .* that is: 4",
    ),
    (2, [*PIPELINE, "stages_per_rank=3"], "6 pipeline stages for 4 layers; .* so choose 4 or fewer"),
    (4, ["pipeline=4", "schedule=zbv"], "8 pipeline stages for 4 layers; .* so choose 4 or fewer"),
    (8, ["pipeline=8", "schedule=gpipe"], "8 pipeline stages for 4 layers; .* so choose 4 or fewer"),
    (1, ["cuts=[2]"], "cuts divide the layers among the stages of a pipeline; set pipeline, or cuts=auto"),
    (2, ["pipeline=2", "cuts=[4]"], r"a stage cannot begin at layer 4; of 4 layers, .* for example \[2\]"),
    (2, [*PIPELINE, "cuts=[1]"], "names 1 first layers, 4 stages need 3, one for each stage but the first"),
    (4, ["pipeline=4", "cuts=[2,1,3]"], r"cuts=\[2, 1, 3\] must increase, .* did you mean \[1, 2, 3\]\?"),
]


@pytest.mark.parametrize(("world", "words", "said"), REFUSED, ids=lambda v: ",".join(v) if isinstance(v, list) else "")
def test_refused_in_one_line_with_the_cure(world, words, said):
    with pytest.raises(UserError, match=said) as caught:
        resolve(run_with(*words), world)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_what_few_micro_batches_still_allow():
    assert resolve(run_with("pipeline=2", "schedule=gpipe", "micro_batch=16"), 2).schedule == "gpipe"
    assert resolve(run_with("pipeline=2", "schedule=zbv", "micro_batch=16"), 2).schedule == "zbv"
    assert resolve(run_with("expert=2", "zero=2"), 2).zero == 2
