"""A layout made definite: the configured one, the number of processes and the model, checked against each other.

All of it before any process group exists: what does not fit gets one line with the cure.
"""

import dataclasses

import torch

from lamella.config import ModelConfig, RunConfig
from lamella.errors import UserError
from lamella.model.lm import LanguageModel
from lamella.nn.shard import Whole


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rank r of the world is rank r % tensor of its tensor group and rank r // tensor of its data group."""

    tensor: int
    data: int
    sequence_parallel: bool
    zero: int
    micro_batch: int
    global_batch_size: int

    @property
    def world(self) -> int:
        return self.tensor * self.data

    def micro_batches(self, data_rank: int) -> list[range]:
        """The rows of a step that a data rank computes, in the pieces that it computes them in."""
        share = self.global_batch_size // self.data
        first = data_rank * share
        return [range(r, r + self.micro_batch) for r in range(first, first + share, self.micro_batch)]


def resolve(run: RunConfig, world: int) -> Layout:
    """The layout of `run` on `world` processes. Raises UserError where it does not fit them, the batch or the model."""
    wanted, train = run.layout, run.train
    if wanted.data is None and world % wanted.tensor:
        raise UserError(
            f"layout: tensor={wanted.tensor} does not divide {world} processes; start a multiple of {wanted.tensor}"
        )
    data = wanted.data or world // wanted.tensor
    if wanted.tensor * data != world:
        raise UserError(
            f"layout: tensor={wanted.tensor} x data={data} needs {wanted.tensor * data} processes, there are {world};"
            " start as many, or leave layout.data out"
        )
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
    check_model(run.model, wanted.tensor)
    return Layout(
        wanted.tensor,
        data,
        wanted.sequence_parallel and wanted.tensor > 1,
        wanted.zero,
        wanted.micro_batch,
        train.global_batch_size,
    )


def check_model(model: ModelConfig, tensor: int) -> None:
    """Lays the model out, on the meta device, as one of `tensor` ranks. Raises UserError where they do not divide."""
    shard = Whole()
    shard.size = tensor
    with torch.device("meta"):
        LanguageModel(model, shard)
