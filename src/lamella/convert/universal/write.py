"""A universal folder, written a parameter at a time, as DeepSpeed's loaders of ZeRO 1, 2 and 3 take it."""

import io
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.convert.map import Link
from lamella.convert.universal.folder import LATEST, OPTIMIZER, ZERO
from lamella.nn.shard import Place

VERSION = 0.2  # of universal checkpoints: {"param", "cat_dim", "sub_param_shape"}
GROUPS = 64  # of an optimizer, more than any has: the loader stops at the shorter list
NAMES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # ZeRO 1 and 2; 3


def write_universal(
    folder: Path,
    step: int,
    tensors: Iterator[tuple[str, str, Tensor]],
    splits: dict[str, dict[str, Any]],
    shapes: dict[str, tuple[int, ...]],
    client: dict[str, Any],
) -> Path:
    """`tensors`: parameter, state, value; `splits`: how it is cut over a tensor group; `client`: what goes with the
    model states. Returns the step's folder. Raises OSError.
    """
    here = folder / f"global_step{step}"
    for name, state, tensor in tensors:
        place = here / ZERO / name
        place.mkdir(parents=True, exist_ok=True)
        _save(place / f"{state}.pt", splits[name] | {"param": tensor.contiguous().clone()})
        if state == "fp32":
            _save(place / "step.pt", torch.tensor(float(step)))
    version = metadata.version("deepspeed")
    optimizer = {
        "ds_version": version,
        "param_groups": [{"params": []} for _ in range(GROUPS)],  # nothing in them: the engine keeps its own
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"params": [0]}]},
    }
    _save(here / ZERO / OPTIMIZER, optimizer)
    states = {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": version,
        "universal_checkpoint_info": {"universal_checkpoint_version": VERSION},
    }
    for name in NAMES:
        _save(here / name, states | client)
    (folder / LATEST).write_text(here.name)
    return here


def split_of(link: Link, place: Place, dim: int) -> dict[str, Any]:
    """How DeepSpeed's loader cuts a tensor: along `dim` of ours, each segment by itself."""
    import lamella.parallel.cpu_host  # noqa: F401, I001  # before DeepSpeed
    from deepspeed.checkpoint.universal_checkpoint import SubparamShape

    shape, there = link.their_shape, dim - (link.form == "item")
    found: dict[str, Any] = {"cat_dim": there}
    if link.of == 1 and len(place.boxes) > 1 and link.size[dim] == place.shape[dim]:
        cut = (*shape[:there], tuple(box.size[dim] for box in place.boxes), *shape[there + 1 :])
        found = {"sub_param_shape": SubparamShape([link.theirs], cut, there)}  # type: ignore[arg-type]
    return found


def _save(file: Path, value: Any) -> None:
    buffer = io.BytesIO()  # on a full disk torch.save into a file tells of the zip format
    torch.save(value, buffer)
    with file.open("xb") as opened:
        opened.write(buffer.getbuffer())
