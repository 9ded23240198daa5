"""A checkpoint without training, saved as train/state.py saves a run's."""

from pathlib import Path
from typing import Any

import torch

from lamella.checkpoint import series, store
from lamella.checkpoint.planner import Pieces
from lamella.config import RunConfig
from lamella.data.store.manifest import read_manifest
from lamella.model.lm import LanguageModel
from lamella.nn.shard import placed_parameters
from tests.nn.building import filled


def save_untrained(run: RunConfig, step: int = 3, **more: Any) -> tuple[Path, LanguageModel]:
    """Saves `step` of the run, with moments beside the masters and `more` values. Returns the checkpoint and its model.
    """
    model = filled(LanguageModel(run.model), seed=step, spread=0.1).requires_grad_(False)
    held = {
        f"{kind}/{name}": Pieces(p.place.shape, torch.float32, [((0,) * p.dim(), p.data * scale)])
        for name, p in placed_parameters(model)
        for kind, scale in (("master", 1.0), ("exp_avg", 0.1), ("exp_avg_sq", 0.01))
    }
    values = {
        "format": 1,
        "step": step,
        "rows": step * run.train.global_batch_size,
        "seed": run.train.seed,
        "data": read_manifest(Path(run.data.path)).fingerprint,
        "config": run.model_dump(mode="json"),
    }
    path = series.step_folder(run.folder / "checkpoints", step)
    store.save(path, held, values | more)
    return path, model
