"""A checkpoint of ours with moments, of any stack, without training or data."""

from pathlib import Path

import torch

from lamella.checkpoint import series, store
from lamella.checkpoint.planner import Pieces
from lamella.config import ModelConfig
from lamella.convert.ours import run_of
from lamella.model.lm import LanguageModel
from lamella.nn.shard import placed_parameters
from tests.nn.building import filled

MOMENTS = (("exp_avg", 0.1), ("exp_avg_sq", 0.01))


def save_stack(tree: dict, folder: Path, step: int, moments: bool = True) -> tuple[Path, LanguageModel]:
    """Returns the checkpoint and its model."""
    run = run_of(ModelConfig.model_validate(tree, strict=False), folder, 64, torch.float32)
    model = filled(LanguageModel(run.model), seed=step, spread=0.15).requires_grad_(False)
    held = {
        f"{kind}/{name}": Pieces(p.place.shape, torch.float32, [((0,) * p.dim(), p.data * scale)])
        for name, p in placed_parameters(model)
        for kind, scale in (("master", 1.0), *(MOMENTS if moments else ()))
    }
    values = {"format": 1, "step": step, "rows": step, "seed": 7, "data": "of the data", "routers": {}}
    path = series.step_folder(folder / "checkpoints", step)
    store.save(path, held, values | {"config": run.model_dump(mode="json")})
    return path, model
