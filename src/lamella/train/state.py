"""What a run is at a step, and its way into a checkpoint and back, under any layout.

Saved are the fp32 masters, both moments, the step, and what the routers keep between steps. There is no other state:
the data's position is the step (rows are a function of seed, data and step), every random draw is a function of seed
and step, and so is the learning rate.
"""

from pathlib import Path
from typing import Any

import torch

from lamella.checkpoint import store
from lamella.checkpoint.boxes import pieces
from lamella.checkpoint.planner import Pieces
from lamella.checkpoint.series import LOSS
from lamella.config import RunConfig
from lamella.data.stream import TrainRows
from lamella.errors import UserError
from lamella.parallel.zero import Zero
from lamella.train.balance import Balance

FORMAT = 1
KEYS = ("sequence_length", "global_batch_size", "seed")


def tensors(zero: Zero) -> dict[str, Pieces]:
    """This process's share of `master/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`, as live views."""
    found = {}
    for name, parameter, start, views in zero.fragments():
        place = parameter.place
        for key, view in views.items():
            held = pieces(view, place.local_shape, start, place.boxes)
            found[f"{key}/{name}"] = Pieces(place.shape, torch.float32, held, place.owner)
    return found


def values(
    step: int, balance: Balance, run: RunConfig, data: TrainRows, heldout_loss: float | None = None
) -> dict[str, Any]:
    """The plain values of `step` finished steps; the held-out loss where it was measured there."""
    return {
        "format": FORMAT,
        "step": step,
        "rows": step * run.train.global_batch_size,
        "seed": run.train.seed,
        "data": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "routers": balance.state,
        "config": run.model_dump(mode="json"),
    } | ({} if heldout_loss is None else {LOSS: heldout_loss})


def load(path: Path, zero: Zero, balance: Balance) -> int:
    """Reads a verified checkpoint into masters, moments, parameters and routers; all processes together.

    Returns its step.
    """
    saved = store.read_values(path)
    step = saved["step"]
    balance.restore(saved.get("routers", {}))
    zero.prepare_state(step)
    store.load(path, tensors(zero), verified=True)
    zero.refresh()
    return step


def check_same_run(path: Path, run: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    """Raises UserError where the checkpoint is of another model, data, batch or seed than `run`. Returns its values."""
    values = store.read_values(path)
    if values["format"] != FORMAT:
        raise UserError(f"{path}: format {values['format']}, this version reads {FORMAT}")
    saved, now = values["config"], run.model_dump(mode="json")
    wanted, had = (
        {key: config["train"][key] for key in KEYS} | _order(config) | config["model"] for config in (now, saved)
    )
    for key in wanted:
        if wanted[key] != had.get(key):
            raise UserError(
                f"{path}: was trained with another {key} than this run's; give the run another name, or restore it"
            )
    if values["data"] != data_fingerprint:
        raise UserError(f"{path}: was trained on other data than {run.data.path}; restore the data, or name a new run")
    return values


def _order(config: dict[str, Any]) -> dict[str, Any]:
    """What beside the data tells the order of the rows."""
    rows = config["train"].get("rows", {"window": 1})
    return {"rows.window": rows["window"], "rows.cost": rows["cost"] if rows["window"] > 1 else None}
