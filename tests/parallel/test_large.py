"""Ranks of 512 that hold a part of a published Jamba, under a group that only says who sits where, without memory.

What a rank holds is counted from the published dimensions (tests/model/test_published_counts.py).
"""

import dataclasses
import math
import random
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from lamella.config import load_run
from lamella.parallel.layout import resolve
from lamella.parallel.local import run_local
from tests.model.test_published_counts import PUBLISHED, expected_local, whole

WORLD = 512
CASES = [
    ("jamba-v0.1", ["tensor=8", "pipeline=4", "data=16"]),
    ("jamba-v0.1", ["tensor=8", "pipeline=4", "expert=16", "schedule=interleaved", "sequence_parallel=true"]),
    ("jamba-1.5-large", ["tensor=8", "pipeline=8", "data=8", "expert=16", "schedule=zbv"]),
]


@dataclasses.dataclass(frozen=True)
class Part:
    """A rank's place in its groups (tensor, data, pipeline, expert), and of each parameter where its boxes lie."""

    seat: tuple[int, int, int, int]
    elements: int
    boxes: dict[str, tuple[tuple[int, ...], tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]]


def run_of(name, words):
    sizes = ["train.sequence_length=4096", f"train.global_batch_size={WORLD}", "layout.micro_batch=1"]
    return load_run("configs/run/quickstart.yaml", [f"model={name}", *sizes, *(f"layout.{w}" for w in words)])


def build(run, ranks):
    """Takes the seat of each rank in turn, and lays out its part as a run would."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lamella.parallel import mesh as meshes
    from lamella.parallel.apply import lay_out
    from lamella.parallel.seat import Seat

    layout, found = resolve(run, WORLD), []
    for rank in ranks:
        dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
        groups = meshes._groups(layout)
        mesh = meshes.Mesh(Seat(rank, WORLD, rank % 8, 8), layout, torch.device("meta"), **groups)
        with torch.device("meta"):
            parameters = dict(lay_out(run.model, mesh, "bf16").named_parameters())
        assert {p.device.type for p in parameters.values()} == {"meta"}
        boxes = {n: (p.place.shape, tuple((b.whole, b.size) for b in p.place.boxes)) for n, p in parameters.items()}
        seat = tuple(group.rank() for group in (mesh.tensor, mesh.data, mesh.pipeline, mesh.expert))
        found.append(Part(seat, sum(p.numel() for p in parameters.values()), boxes))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


def stages_held(layout, pipeline):
    """The numbers of a pipeline rank's stages: every schedule's rule."""
    if layout.schedule == "zbv":
        return [pipeline, 2 * layout.pipeline - 1 - pipeline]
    return range(pipeline, len(layout.stages), layout.pipeline)


def expected(dims, layout, pipeline):
    stages = [layout.stages[number] for number in stages_held(layout, pipeline)]
    layers = [layer for stage in stages for layer in stage.layers]
    ends = 0 in layers, dims.layers - 1 in layers
    return expected_local(dims, layout.tensor, layers, layout.expert, *ends)


@pytest.mark.parametrize(("name", "words"), CASES)
def test_ranks_of_512(name, words):
    """The ranks that hold one copy of the model, those of the first data ranks, and some of all others."""
    run, dims = run_of(name, words), PUBLISHED[name]
    layout = resolve(run, WORLD)
    assert [layer for stage in layout.stages for layer in stage.layers] == list(range(dims.layers))
    copies = max(1, layout.expert // layout.tensor)  # data ranks that hold the experts between them
    side = layout.tensor * layout.data
    one_copy = [t + layout.tensor * d + side * p
                for p in range(layout.pipeline) for d in range(copies) for t in range(layout.tensor)]  # fmt: skip
    ranks = [*one_copy, WORLD // 2 - 1, WORLD - 1, *random.Random(0).sample(range(WORLD), 4)]
    parts = run_local(1, build, run, ranks, timeout=250)[0].value
    for rank, part in zip(ranks, parts, strict=True):
        tensor, data, pipeline = rank % layout.tensor, rank % side // layout.tensor, rank // side
        assert part.seat == (tensor, data, pipeline, rank % side % layout.expert)
        assert part.elements == expected(dims, layout, pipeline)
    boxes = {(n, shape, box) for part in parts[: len(one_copy)] for n, (shape, held) in part.boxes.items()
             for box in held}  # fmt: skip
    covered, shapes = Counter(), {}
    for parameter, shape, (_, size) in boxes:
        covered[parameter] += math.prod(size)
        shapes[parameter] = shape
    assert covered == {parameter: math.prod(shape) for parameter, shape in shapes.items()}
    assert sum(covered.values()) == whole(dims)
