"""The stages of this process under a schedule of torch.distributed.pipelining.

What travels between stages is the stream and whatever layers carry beside it; everything else about a micro-batch
every process reads for itself. The schedule deals numbers of micro-batches, and a stage looks its own up.

Zero-bubble (zbv) splits backward in two: linears leave their weights' gradients waiting (`nn/deferred.py`), and the
schedule asks for them where the pipeline would stand idle. Everything else's gradients come with the first part.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from lamella.model.lm import LanguageModel
from lamella.model.stage import Stage, carried_into
from lamella.nn.deferred import WeightGradients
from lamella.parallel.mesh import Mesh
from lamella.parallel.passes import Loss, MicroBatch

SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zbv": pipelining.ScheduleZBVZeroBubble,
}
AHEAD = 8  # tensors that evaluation may have sent and not yet seen arrive


class Pipeline:
    """Rows of `length` tokens through the stages of `model`; every step has the layout's number of micro-batches."""

    def __init__(self, model: LanguageModel, loss: Loss, mesh: Mesh, length: int):
        layout = mesh.layout
        self.model, self.loss, self.mesh, self.length, self.device = model, loss, mesh, length, mesh.device
        self.count = layout.micro_batch_count
        self.batches: list[MicroBatch] = []
        self.weight = 1.0
        self.total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self.held: dict[int, _Held] = {}
        if layout.schedule == "zbv":
            model.shard.deferred = WeightGradients()
        stages = [self._stage(stage) for stage in model.stages]
        self.first, self.last = any(s.first for s in model.stages), any(s.last for s in model.stages)
        # A tied weight lies at both ends of the pipeline: as one where they meet (zbv), else as two copies.
        self.tied = None
        if model.config.tie_embeddings and self.first != self.last:
            self.tied = model.embedding.weight
        kind = SCHEDULES[layout.schedule]
        several = layout.schedule in ("interleaved", "zbv")
        self.schedule = kind(
            stages if several else stages[0],  # type: ignore[arg-type]
            self.count,
            loss_fn=self._weighted_loss,
            scale_grads=False,
        )

    def train(self, batches: Iterable[MicroBatch], weight: float, mark: Callable[[str], None]) -> Tensor:
        self.batches, self.weight = list(batches), weight
        self.total = torch.zeros_like(self.total)
        numbers = torch.arange(self.count)
        first = (numbers,) if self.first else ()
        target = {"target": numbers} if self.last else {}
        self.schedule.step(*first, number=numbers, return_outputs=False, **target)
        if self.tied is not None and self.tied.grad is not None:
            dist.all_reduce(self.tied.grad, group=self.mesh.ends)
        mark("pipeline")
        self.batches = []
        return self.total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Forward alone, by our own hands: torch's schedules cannot leave backward out where stages share a process."""
        total, sent = torch.zeros_like(self.total), deque[tuple[Any, Tensor]]()
        for batch in batches:
            values: tuple[Tensor, ...] = (batch.tokens,)
            for stage in self.model.stages:
                held = self.held[stage.index]
                if not stage.first and not self._is_here(stage.index - 1):
                    values = self._receive(stage)
                values = held.run(batch, *values)
                if stage.last:
                    total += self.loss(values[0], batch)
                elif not self._is_here(stage.index + 1):
                    sent += self._send(stage, values)
                while len(sent) > AHEAD:
                    sent.popleft()[0].wait()
        for work, _ in sent:
            work.wait()
        return total

    def _is_here(self, stage: int) -> bool:
        return any(held.index == stage for held in self.model.stages)

    def _receive(self, stage: Stage) -> tuple[Tensor, ...]:
        source = dist.get_global_rank(self.mesh.pipeline, self.mesh.layout.rank_of(stage.index - 1))
        values = tuple(torch.empty_like(t, device=self.device, requires_grad=False) for t in self._edge(stage))
        for value in values:
            dist.recv(value, source, group=self.mesh.pipeline)
        return values

    def _send(self, stage: Stage, values: tuple[Tensor, ...]) -> list[tuple[Any, Tensor]]:
        """The works, with what must live until they are done."""
        target = dist.get_global_rank(self.mesh.pipeline, self.mesh.layout.rank_of(stage.index + 1))
        return [(dist.isend(value, target, group=self.mesh.pipeline), value) for value in values]

    def _weighted_loss(self, nats_BT: Tensor, number: Tensor) -> Tensor:
        loss = self.loss(nats_BT, self.batches[int(number)])
        self.total += loss.detach()
        return loss * self.weight

    def _edge(self, into: Stage) -> tuple[Tensor, ...]:
        """What travels into a stage, as tensors without content: the stream, and what is carried beside it."""
        layout, share = self.mesh.layout, self.model.shard.size
        stream = self._empty(self.length // (share if layout.sequence_parallel else 1), self.model.config.d_model)
        carried = carried_into(self.model.config, into).values()
        return (stream, *(self._empty(self.length, width // share) for width in carried))

    def _empty(self, time: int, width: int) -> Tensor:
        size, dtype = self.mesh.layout.micro_batch, self.model.shard.dtype
        return torch.empty(size, time, width, dtype=dtype, device="meta", requires_grad=True)

    def _nats(self) -> Tensor:
        return torch.empty(self.mesh.layout.micro_batch, self.length, device="meta", requires_grad=True)

    def _stage(self, stage: Stage) -> pipelining.PipelineStage:
        """With the shapes that it takes and gives: else torch would run the model once on nothing to find them."""
        following = None if stage.last else self.mesh.layout.stages[stage.index + 1]
        held = self.held[stage.index] = _Held(self, self.model, stage, following)
        deferred = self.model.shard.deferred
        return pipelining.PipelineStage(
            held,
            stage.index,
            stage.count,
            self.device,
            input_args=torch.zeros(1, dtype=torch.long) if stage.first else self._edge(stage),
            output_args=self._nats() if following is None else self._edge(following),
            group=self.mesh.pipeline,
            dw_builder=None if deferred is None else deferred.take,
        )


class _Held(nn.Module):
    """A stage as torch's pipeline calls it: tensors in, tensors out."""

    def __init__(self, pipeline: Pipeline, model: LanguageModel, stage: Stage, following: Stage | None):
        super().__init__()
        self.pipeline, self.model, self.stage = pipeline, model, stage
        self.taken = list(carried_into(model.config, stage))
        self.given = [] if following is None else list(carried_into(model.config, following))

    def forward(self, *values: Tensor, number: Tensor) -> Tensor | tuple[Tensor, ...]:
        batch = self.pipeline.batches[int(number)]
        y, *carried = self.run(batch, *((batch.tokens,) if self.stage.first else values))
        return (y, *carried) if carried else y

    def run(self, batch: MicroBatch, x: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        """The stream, or tokens, and what is carried; into what the next stage takes, or each target's -log p."""
        rows = dataclasses.replace(batch.rows, carried=dict(zip(self.taken, carried, strict=True)))
        y = self.model.run(self.stage, x, rows, targets_BT=batch.targets)
        return (y.contiguous(), *(rows.carried[name].contiguous() for name in self.given))
