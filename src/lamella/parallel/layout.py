"""A layout made definite: the configured one, the number of processes and the model, checked against each other.

All of it before any process group exists: what does not fit gets one line with the cure.
"""

import dataclasses
from typing import Literal

import torch

from lamella.channels.moe import Config as MoE
from lamella.config import LayoutConfig, ModelConfig, RunConfig
from lamella.errors import UserError
from lamella.model.cuts import check_cuts, cut, layer_costs
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from lamella.model.stage import Stage, make_stages
from lamella.nn.rows import Recompute
from lamella.nn.shard import Exchange, Whole


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ranks count through the tensor group first, then data, then pipeline: r = t + tensor * (d + data * p).

    The expert group is made of neighbours among the ranks of one pipeline rank. `stages` are all of the pipeline's.
    """

    tensor: int
    data: int
    pipeline: int
    expert: int
    sequence_parallel: bool
    schedule: str
    stages: tuple[Stage, ...]
    zero: int
    offload_optimizer: bool
    recompute: Recompute
    logits: Literal["auto", "whole", "pieces"]
    micro_batch: int
    global_batch_size: int

    @property
    def world(self) -> int:
        return self.tensor * self.data * self.pipeline

    def __str__(self) -> str:
        words = [f"tensor {self.tensor}" + (", sequence parallel" if self.sequence_parallel else "")]
        if self.pipeline > 1:
            words.append(f"pipeline {self.pipeline} ({self.schedule}, {len(self.stages)} stages)")
        words.append(f"data {self.data}")
        if self.expert > 1:
            words.append(f"with expert {self.expert}")
        others = [f"ZeRO {self.zero}" + (", offloaded" if self.offload_optimizer else "")]
        if self.recompute != "none":
            others.append(f"{self.recompute} recomputation")
        if self.logits != "auto":
            others.append("logits in pieces" if self.logits == "pieces" else "whole logits")
        return ", ".join([" x ".join(words).replace(" x with", " with"), *others])

    @property
    def micro_batch_count(self) -> int:
        """How many a data rank computes in a step."""
        return self.global_batch_size // self.data // self.micro_batch

    def micro_batches(self, rows: list[int]) -> list[list[int]]:
        """A data rank's rows of a step in the pieces that it computes them in."""
        return [rows[r : r + self.micro_batch] for r in range(0, len(rows), self.micro_batch)]

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that holds a stage: round and round, or for zbv there and back."""
        turn, place = divmod(stage, self.pipeline)
        return self.pipeline - 1 - place if self.schedule == "zbv" and turn else place

    def stages_of(self, pipeline_rank: int) -> tuple[Stage, ...]:
        """The stages that a pipeline rank holds, in their order."""
        return tuple(stage for stage in self.stages if self.rank_of(stage.index) == pipeline_rank)


def resolve(run: RunConfig, world: int) -> Layout:
    """The layout of `run` on `world` processes. Raises UserError where it does not fit them, the batch or the model."""
    wanted, train = run.layout, run.train
    data = _data(wanted, world)
    at_once = data * wanted.micro_batch
    if train.global_batch_size % at_once:
        near = max(1, round(train.global_batch_size / at_once)) * at_once
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} cannot be dealt to data={data} ranks in micro-batches"
            f" of {wanted.micro_batch} rows; the nearest that can is {near}"
        )
    if wanted.sequence_parallel and train.sequence_length % wanted.tensor:
        near = max(1, round(train.sequence_length / wanted.tensor)) * wanted.tensor
        raise UserError(
            f"layout: sequence_parallel splits train.sequence_length={train.sequence_length} over"
            f" tensor={wanted.tensor}; the nearest length that divides is {near}"
        )
    _check_experts(run.model, wanted, data)
    _check_zero(wanted)
    check_model(run.model, wanted)
    return Layout(
        wanted.tensor,
        data,
        wanted.pipeline,
        wanted.expert,
        wanted.sequence_parallel and wanted.tensor > 1,
        wanted.schedule,
        _stages(run, train.global_batch_size // at_once),
        wanted.zero,
        wanted.offload_optimizer,
        wanted.recompute,
        wanted.logits,
        wanted.micro_batch,
        train.global_batch_size,
    )


def check_model(model: ModelConfig, layout: LayoutConfig) -> None:
    """Lays the model out, on the meta device, as one rank. Raises UserError where its sizes do not divide."""
    shard = Whole(exchange=Exchange(0, layout.expert))
    shard.size = layout.tensor
    with torch.device("meta"):
        LanguageModel(model, shard)


def stage_count(layout: LayoutConfig) -> int:
    """How many stages the pipeline's schedule has."""
    return layout.pipeline * {"interleaved": layout.stages_per_rank, "zbv": 2}.get(layout.schedule, 1)


def _data(wanted: LayoutConfig, world: int) -> int:
    others = wanted.tensor * wanted.pipeline
    words = f"tensor={wanted.tensor}" + (f" x pipeline={wanted.pipeline}" if wanted.pipeline > 1 else "")
    if wanted.data is None and world % others:
        raise UserError(f"layout: {words} does not divide {world} processes; start a multiple of {others}")
    data = wanted.data or world // others
    if others * data != world:
        raise UserError(
            f"layout: {words} x data={data} needs {others * data} processes, there are {world};"
            " start as many, or leave layout.data out"
        )
    return data


def _stages(run: RunConfig, micro_batches: int) -> tuple[Stage, ...]:
    wanted, layers = run.layout, len(plan_layers(run.model))
    if wanted.pipeline == 1:
        if wanted.cuts != "auto":
            raise UserError("layout: cuts divide the layers among the stages of a pipeline; set pipeline, or cuts=auto")
        return make_stages((), layers)
    count = stage_count(wanted)
    if wanted.schedule in ("1f1b", "interleaved") and micro_batches < wanted.pipeline:
        raise UserError(
            f"layout: schedule={wanted.schedule} needs at least pipeline={wanted.pipeline} micro-batches a step, there"
            f" are {micro_batches}; make micro_batch smaller or train.global_batch_size larger"
        )
    rounds = max(1, micro_batches // wanted.pipeline)
    if wanted.schedule == "interleaved" and micro_batches % rounds:
        near = micro_batches // wanted.pipeline * wanted.pipeline
        raise UserError(
            f"layout: schedule=interleaved wants rounds of pipeline={wanted.pipeline} micro-batches or of equally more,"
            f" not {micro_batches} of them; the nearest number that is: {near}"
        )
    if wanted.cuts == "auto":
        starts = cut(layer_costs(run.model, run.train.sequence_length, wanted.recompute), count)
    else:
        starts = wanted.cuts
        check_cuts(starts, count, layers)
    return make_stages(starts, layers)


def _check_experts(model: ModelConfig, wanted: LayoutConfig, data: int) -> None:
    if wanted.expert == 1:
        return
    if not any(isinstance(plan.channel, MoE) for plan in plan_layers(model)):
        raise UserError(f"layout: expert={wanted.expert}, but the stack has no mixture of experts; leave expert out")
    ranks = wanted.tensor * data
    if ranks % wanted.expert:
        near = max(n for n in range(1, ranks + 1) if ranks % n == 0 and n <= wanted.expert)
        raise UserError(
            f"layout: expert={wanted.expert} does not divide tensor={wanted.tensor} x data={data}; the nearest that"
            f" does is {near}"
        )


def _check_zero(wanted: LayoutConfig) -> None:
    if wanted.zero > 1 and wanted.pipeline > 1:
        raise UserError(
            f"layout: zero={wanted.zero} splits gradients between the micro-batches of a pipeline, which DeepSpeed"
            " cannot; with pipeline > 1 take zero=1"
        )
    if wanted.zero == 3 and wanted.expert > 1:
        raise UserError("layout: zero=3 does not split dealt experts (DeepSpeed refuses it); take zero=2, or expert=1")
