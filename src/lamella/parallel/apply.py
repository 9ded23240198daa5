"""The order in which a model becomes a distributed one."""

import torch

from lamella.config import ModelConfig
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from lamella.nn.shard import Shard, Whole
from lamella.parallel.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_shard(config: ModelConfig, mesh: Mesh, precision: str) -> Shard:
    """This process's seam: whole where the tensor group is one, Megatron's elsewhere."""
    dtype, num_layers = DTYPES[precision], len(plan_layers(config))
    if mesh.layout.tensor == 1:
        return Whole(dtype, config.init_std, num_layers)
    from lamella.parallel.tensor import TensorShard

    return TensorShard(mesh.tensor, mesh.layout.sequence_parallel, dtype, config.init_std, num_layers)


def build_model(config: ModelConfig, mesh: Mesh, precision: str, seed: int) -> LanguageModel:
    """This process's part of the model, parameters in fp32 at their initial values, on its device."""
    model = LanguageModel(config, make_shard(config, mesh, precision))
    initialize(model, seed)
    return model.to(mesh.device)
