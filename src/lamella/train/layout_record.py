"""What a run's layout is drawn from: `layout.json` in its folder, and the pipeline's schedule reckoned from it.

Only `describe` imports torch.
"""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lamella.config import RunConfig

if TYPE_CHECKING:
    from lamella.parallel.layout import Layout

FILE = "layout.json"


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """`costs` of its layers and of both ends, as shares of the whole model's; so are `forward`, `backward` and, of
    backward, `weight`: what zbv puts off.
    """

    rank: int  # of the pipeline
    first: int
    layers: tuple[str, ...]
    costs: tuple[float, ...]
    embedding: float
    head: float
    forward: float
    backward: float
    weight: float

    @property
    def input(self) -> float:
        """Of backward, what zbv does not put off."""
        return self.backward - self.weight

    @property
    def cost(self) -> float:
        return math.fsum((*self.costs, self.embedding, self.head))


@dataclasses.dataclass(frozen=True)
class LayoutRecord:
    """A layout as it is drawn. Ranks count through tensor, then data, then pipeline."""

    words: str
    tensor: int
    data: int
    pipeline: int
    expert: int
    zero: int
    schedule: str
    micro_batches: int
    stages: tuple[StageRecord, ...]

    @classmethod
    def load(cls, file: Path) -> "LayoutRecord":
        """Raises OSError, and ValueError where `file` is no record of this version."""
        try:
            found = json.loads(file.read_text())
            stages = [s | {name: tuple(s[name]) for name in ("layers", "costs")} for s in found.pop("stages")]
            return cls(**found, stages=tuple(StageRecord(**s) for s in stages))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None

    def save(self, file: Path) -> None:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        temporary.replace(file)

    @property
    def world(self) -> int:
        return self.tensor * self.data * self.pipeline

    def place(self, rank: int) -> tuple[int, int, int]:
        """Its pipeline, data and tensor coordinates."""
        rest, t = divmod(rank, self.tensor)
        return rest // self.data, rest % self.data, t

    def expert_groups(self) -> list[range]:
        """Neighbours among the ranks of one pipeline rank."""
        return [range(r, r + self.expert) for r in range(0, self.world, self.expert)]

    def stages_of(self, pipeline_rank: int) -> list[int]:
        return [i for i, stage in enumerate(self.stages) if stage.rank == pipeline_rank]


def describe(run: RunConfig, layout: "Layout") -> LayoutRecord:
    """Imports torch, as the parts do that say what they cost."""
    from lamella.channels.mlp import mlp_flops
    from lamella.channels.moe import Config as MoE
    from lamella.model.cuts import RATES, layer_costs
    from lamella.model.stack import plan_layers

    model, length, plans = run.model, run.train.sequence_length, plan_layers(run.model)
    both = layer_costs(model, length, layout.recompute)
    forward = layer_costs(model, length, rates={kind: (ahead, 0) for kind, (ahead, _) in RATES.items()})
    whole = both.stage(0, len(plans))
    waits = RATES["matmul"][1] / 2  # of a linear's operations in forward; of routed experts none wait
    linear = layer_costs(model, length, rates=dict.fromkeys(RATES, (0, 0)) | {"matmul": (waits, 0)})
    routed = [0.0] * len(plans)
    for i, channel in enumerate(plan.channel for plan in plans):
        if isinstance(channel, MoE):
            shared = mlp_flops(channel.activation, model.d_model, channel.shared_d_ff, length)
            routed[i] = waits * (channel.flops(model.d_model, length).matmul - shared.matmul)
    stages = []
    for stage in layout.stages:
        a, b = stage.layers.start, stage.layers.stop
        ahead = forward.stage(a, b)
        weight = linear.stage(a, b) - math.fsum(routed[a:b])
        stages.append(
            StageRecord(
                layout.rank_of(stage.index),
                a,
                tuple(plan.name for plan in plans[a:b]),
                tuple(cost / whole for cost in both.layers[a:b]),
                both.embedding / whole * stage.first,
                both.head / whole * stage.last,
                ahead / whole,
                (both.stage(a, b) - ahead) / whole,
                weight / whole,
            )
        )
    return LayoutRecord(
        str(layout),
        layout.tensor,
        layout.data,
        layout.pipeline,
        layout.expert,
        layout.zero,
        layout.schedule,
        layout.micro_batch_count,
        tuple(stages),
    )


class Slot(NamedTuple):
    """A stage's turn at a micro-batch: F forward, B backward; in zbv I the inputs' part of backward, W the weights'."""

    kind: str
    stage: int
    number: int


def order(schedule: str, pipeline: int, stages: int, count: int, rank: int) -> list[Slot]:
    """What a pipeline rank computes in a step of `count` micro-batches, as torch's schedules have it."""
    words = {"gpipe": _gpipe, "1f1b": _1f1b, "interleaved": _interleaved, "zbv": _zbv}[schedule]
    seen: Counter[tuple[str, int]] = Counter()
    found = []
    for kind, stage in words(pipeline, stages, count, rank):
        found.append(Slot(kind, stage, seen[kind, stage]))
        seen[kind, stage] += 1
    return [slot for slot in found if slot.number < count]  # zbv's is made for 2 x pipeline - 1 of them at least


Words = Iterable[tuple[str, int]]


def _gpipe(pipeline: int, stages: int, count: int, rank: int) -> Words:
    return [("F", rank)] * count + [("B", rank)] * count


def _1f1b(pipeline: int, stages: int, count: int, rank: int) -> Words:
    ahead = min(count, pipeline - rank)
    return [("F", rank)] * ahead + [("B", rank), ("F", rank)] * (count - ahead) + [("B", rank)] * ahead


def _interleaved(pipeline: int, stages: int, count: int, rank: int) -> Words:
    mine = range(rank, stages, pipeline)
    in_round = count // max(1, count // pipeline)
    total = count * len(mine)
    ahead = min(total, (len(mine) - 1) * in_round + 2 * (pipeline - 1 - rank))
    forward = [("F", mine[i // in_round % len(mine)]) for i in range(total)]
    backward = [("B", mine[-1 - i // in_round % len(mine)]) for i in range(total)]
    steady = itertools.chain(*zip(forward[ahead:], backward, strict=False))
    return [*forward[:ahead], *steady, *backward[total - ahead :]]


def _zbv(pipeline: int, stages: int, count: int, rank: int) -> Words:
    there, back = rank, stages - 1 - rank
    total, left = max(2 * pipeline - 1, count), pipeline - rank
    ahead = 2 * left - 1 + rank  # forwards of `there` before the steady part
    first = [("F", there)] * (2 * left - 1) + [("F", back), ("F", there)] * rank
    first += [("F", back), ("I", back), ("W", back)] * left
    steady = [("I", there), ("W", there), ("F", back), ("I", back), ("W", back)]
    middle = [("F", there), *steady] * (total - ahead) + steady * (ahead - pipeline)
    last = [("I", there), ("I", back)] * rank + [("I", there), ("W", there)] * left
    return first + middle + last + [("W", back)] * rank + [("W", there)] * rank


def timeline(record: LayoutRecord) -> list[list[tuple[Slot, float, float]]]:
    """By pipeline rank: its slots with start and length, each begun as soon as what it needs is there.

    The unit is the cost of one micro-batch in the whole model; communication costs nothing.
    """
    count = len(record.stages)
    orders = [order(record.schedule, record.pipeline, count, record.micro_batches, p) for p in range(record.pipeline)]
    found: list[list[tuple[Slot, float, float]]] = [[] for _ in orders]
    ends: dict[Slot, float] = {}
    clock = [0.0] * len(orders)
    while any(len(f) < len(o) for f, o in zip(found, orders, strict=True)):
        before = len(ends)
        for p, slots in enumerate(orders):
            for slot in slots[len(found[p]) :]:
                needs = _needs(slot, count)
                if not all(need in ends for need in needs):
                    break
                start, length = max((clock[p], *(ends[need] for need in needs))), _length(slot, record)
                found[p].append((slot, start, length))
                ends[slot] = clock[p] = start + length
        assert len(ends) > before, "the schedule waits for itself"
    return found


def _needs(slot: Slot, stages: int) -> list[Slot]:
    kind, stage, number = slot
    if kind == "F":
        return [Slot("F", stage - 1, number)] if stage else []
    if kind == "W":
        return [Slot("I", stage, number)]
    later = [Slot(kind, stage + 1, number)] if stage + 1 < stages else []
    return [Slot("F", stage, number), *later]


def _length(slot: Slot, record: LayoutRecord) -> float:
    s = record.stages[slot.stage]
    return {"F": s.forward, "B": s.backward, "I": s.input, "W": s.weight}[slot.kind]
