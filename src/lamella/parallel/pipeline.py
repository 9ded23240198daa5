"""The stages of this process under a schedule of torch.distributed.pipelining.

What travels between stages is the stream and whatever layers carry beside it; everything else about a micro-batch
every process reads for itself. The schedule deals numbers of micro-batches, and a stage looks its own up.

Zero-bubble (zbv) splits backward in two: linears leave their weights' gradients waiting (`nn/deferred.py`), and the
schedule asks for them where the pipeline would stand idle. Everything else's gradients come with the first part.
"""

import dataclasses
from collections.abc import Callable, Iterable

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


class Pipeline:
    """Rows of `length` tokens through the stages of `model`; every step has the layout's number of micro-batches."""

    def __init__(self, model: LanguageModel, loss: Loss, mesh: Mesh, length: int):
        layout = mesh.layout
        self.loss, self.device = loss, mesh.device
        self.count = len(layout.micro_batches(0))
        self.batches: list[MicroBatch] = []
        self.weight = 1.0
        self.total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        if layout.schedule == "zbv":
            model.shard.deferred = WeightGradients()
        stages = [self._stage(model, stage, mesh, length) for stage in model.stages]
        self.first, self.last = any(s.first for s in model.stages), any(s.last for s in model.stages)
        # A tied weight lies at both ends of the pipeline: as one where they meet (zbv), else as two copies.
        self.tied, self.ends = None, mesh.ends
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
        self._begin(list(batches), weight)
        self._run(self.schedule.step, return_outputs=False)
        if self.tied is not None and self.tied.grad is not None:
            dist.all_reduce(self.tied.grad, group=self.ends)
        mark("pipeline")
        self.batches = []
        return self.total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        total = torch.zeros_like(self.total)
        waiting = list(batches)
        assert len(waiting) % self.count == 0, (len(waiting), self.count)
        for at in range(0, len(waiting), self.count):
            self._begin(waiting[at : at + self.count], 1.0)
            self._run(self.schedule.eval, return_outputs=False)
            total += self.total
        self.batches = []
        return total

    def _begin(self, batches: list[MicroBatch], weight: float) -> None:
        self.batches, self.weight = batches, weight
        self.total = torch.zeros_like(self.total)

    def _run(self, function: Callable[..., object], **options: bool) -> None:
        numbers = torch.arange(self.count)
        first = (numbers,) if self.first else ()
        target = {"target": numbers} if self.last else {}
        function(*first, number=numbers, **target, **options)

    def _weighted_loss(self, logits_BTV: Tensor, number: Tensor) -> Tensor:
        loss = self.loss(logits_BTV, self.batches[int(number)].targets)
        self.total += loss.detach()
        return loss * self.weight

    def _stage(self, model: LanguageModel, stage: Stage, mesh: Mesh, length: int) -> pipelining.PipelineStage:
        """With the shapes that it takes and gives: else torch would run the model once on nothing to find them."""
        layout, config = mesh.layout, model.config
        size, share = layout.micro_batch, model.shard.size
        number = torch.zeros(1, dtype=torch.long)

        def tensor(time: int, width: int) -> Tensor:
            return torch.empty(size, time, width, dtype=model.shard.dtype, device="meta", requires_grad=True)

        def edge(into: Stage) -> tuple[Tensor, ...]:
            stream = tensor(length // (share if layout.sequence_parallel else 1), config.d_model)
            return (stream, *(tensor(length, width // share) for width in carried_into(config, into).values()))

        following = None if stage.last else layout.stages[stage.index + 1]
        deferred = model.shard.deferred
        return pipelining.PipelineStage(
            _Held(self, model, stage, following),
            stage.index,
            stage.count,
            mesh.device,
            input_args=number if stage.first else edge(stage),
            output_args=tensor(length, config.vocab_size // share) if following is None else edge(following),
            group=mesh.pipeline,
            dw_builder=None if deferred is None else deferred.take,
        )


class _Held(nn.Module):
    """A stage as torch's pipeline calls it: tensors in, tensors out."""

    def __init__(self, pipeline: Pipeline, model: LanguageModel, stage: Stage, following: Stage | None):
        super().__init__()
        self.pipeline, self.model, self.stage = pipeline, model, stage
        self.taken = list(carried_into(model.config, stage))
        self.given = [] if following is None else list(carried_into(model.config, following))

    def forward(self, x: Tensor, *carried: Tensor, number: Tensor) -> Tensor | tuple[Tensor, ...]:
        batch = self.pipeline.batches[int(number)]
        rows = dataclasses.replace(batch.rows, carried=dict(zip(self.taken, carried, strict=True)))
        y = self.model.run(self.stage, batch.tokens if self.stage.first else x, rows).contiguous()
        return (y, *(rows.carried[name].contiguous() for name in self.given)) if self.given else y
