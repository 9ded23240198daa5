"""The order in which a model becomes a distributed one."""

import torch

from lamella.config import ModelConfig
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from lamella.nn.shard import Shard, Whole
from lamella.parallel.layout import Layout
from lamella.parallel.mesh import Mesh
from lamella.parallel.passes import Loss, Passes, Sequential
from lamella.parallel.zero import Zero

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_shard(config: ModelConfig, mesh: Mesh, precision: str) -> Shard:
    """This process's seam: whole where the tensor group is one, Megatron's elsewhere."""
    dtype, num_layers, exchange = DTYPES[precision], len(plan_layers(config)), None
    if mesh.layout.expert > 1:
        from lamella.parallel.expert import AllToAll

        exchange = AllToAll(mesh.expert)
    if mesh.layout.tensor == 1:
        shard: Shard = Whole(dtype, config.init_std, num_layers, exchange)
    else:
        from lamella.parallel.tensor import TensorShard

        sequence = mesh.layout.sequence_parallel
        shard = TensorShard(mesh.tensor, sequence, dtype, config.init_std, num_layers, exchange)
    shard.pieces = in_pieces(mesh.layout, mesh.device)
    return shard


def in_pieces(layout: Layout, device: torch.device) -> bool:
    """Whether the loss makes its logits in pieces."""
    return layout.logits == "pieces" or (layout.logits == "auto" and device.type == "cuda")


def lay_out(config: ModelConfig, mesh: Mesh, precision: str) -> LanguageModel:
    """This process's part of the model, its parameters empty, on torch's default device."""
    return LanguageModel(config, make_shard(config, mesh, precision), mesh.layout.stages_of(mesh.pipeline.rank()))


def build_model(config: ModelConfig, mesh: Mesh, precision: str, seed: int) -> LanguageModel:
    """This process's part of the model, parameters in fp32 at their initial values, on its device."""
    model = lay_out(config, mesh, precision)
    initialize(model, seed)
    return model.to(mesh.device)


def make_passes(model: LanguageModel, zero: Zero, loss: Loss, mesh: Mesh, length: int) -> Passes:
    """How this process runs its part over micro-batches of rows of `length` tokens."""
    if mesh.layout.pipeline == 1:
        return Sequential(model, loss, zero.module, zero.backward)
    from lamella.parallel.pipeline import Pipeline

    return Pipeline(model, loss, mesh, length)
