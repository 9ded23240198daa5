"""The gradient of one step: what `loop` trains with and `verify` compares."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lamella.nn.draw import Draw
from lamella.nn.record import Record
from lamella.nn.rows import Rows
from lamella.parallel.mesh import Mesh
from lamella.parallel.passes import MicroBatch, Passes
from lamella.train.clock import Clock
from lamella.train.feed import Feed
from lamella.train.loss import step_weight


def accumulate_gradients(
    passes: Passes, feed: Feed, mesh: Mesh, step: int, seed: int, record: Record, clock: Clock
) -> Tensor:
    """Adds this rank's gradients of step `step` to the parameters, micro-batch by micro-batch.

    They are scaled so that their mean over the data group is the gradient of the step's loss. Returns the sum of this
    data rank's token losses, fp64 (0 where the pipeline's last stage is elsewhere); `record` takes what the model
    records, `clock` the time by part.
    """
    weight = step_weight(feed.target_count(step), mesh.layout.data)
    return passes.train(_micro_batches(feed, mesh, step, seed, record, clock), weight, clock.mark)


def _micro_batches(feed: Feed, mesh: Mesh, step: int, seed: int, record: Record, clock: Clock) -> Iterator[MicroBatch]:
    layout = mesh.layout
    for numbers, batch in feed.step(step):
        rows = Rows(
            batch.document,
            batch.position,
            draw=Draw(seed, step, torch.tensor(numbers, device=mesh.device)),
            loss_scale=layout.data / layout.global_batch_size,
            record=record,
            source_BT=batch.source,
            recompute=layout.recompute,
        )
        clock.mark("data")
        yield MicroBatch(batch.tokens, batch.targets, rows)
