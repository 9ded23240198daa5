"""Our side: a checkpoint as `train` writes it, read and written a piece at a time.

A converted checkpoint lies in a folder like a run's. It holds the masters and no moments: `generate` and `eval` take
it, and `train.init_from` starts from it. What of config.json is no part of the model is kept for the way back.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoint import series, source, store
from lamella.checkpoint.boxes import pieces
from lamella.checkpoint.planner import Pieces
from lamella.config import ModelConfig, RunConfig
from lamella.convert.map import Link
from lamella.convert.write import Kinds
from lamella.errors import UserError
from lamella.nn.shard import Place
from lamella.train.restore import FORMAT, read_run

BATCH_BYTES = 64 * 2**20  # read at once: as much as a saved piece has at most
KEPT = "converted"  # in a checkpoint's values


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a converted checkpoint remembers: family, config.json, dtype of the weights and of those that differ."""

    family: str
    config: dict[str, Any]
    dtype: str
    others: dict[str, str]


class Checkpoint:
    """One of ours, verified. Raises UserError as `restore` does."""

    def __init__(self, path: Path):
        self.path = path
        self.values, self.run = read_run(path)
        store.verify(path)
        self.kept = Kept(**self.values[KEPT]) if KEPT in self.values else None

    def check_names(self, found: Iterable[str]) -> None:
        """Raises UserError where the checkpoint has a master that the model has not."""
        left = {n.removeprefix("master/") for n in store.names(self.path) if n.startswith("master/")} - set(found)
        if left:
            raise UserError(f"{self.path}: {min(left)} has no place in its own model; it is of another version")

    def theirs(
        self, links: list[Link], places: dict[str, Place], kinds: Kinds, state: str = "master"
    ) -> Iterator[tuple[str, Tensor]]:
        """Their tensors, in the order of their first links; `state`: or their moments. Raises UserError."""
        for batch in _batches(links):
            blocks = [[torch.empty(link.size) for link in group] for group in batch]
            store.load(self.path, _wanted(batch, blocks, places, state), partial=True, verified=True)
            while blocks:
                group = batch[-len(blocks)]
                yield group[0].theirs, _assembled(group, blocks.pop(0), kinds[group[0].theirs].dtype)


class Produced(source.Produced):
    """In the boxes that a run of one process would save. `produce(offset, size)`: fp32."""

    def __init__(self, place: Place, produce: Callable[[tuple[int, ...], tuple[int, ...]], Tensor]):
        meta = torch.empty(math.prod(place.shape), device="meta")
        boxes = [(at, tuple(view.shape)) for at, view in pieces(meta, place.shape, 0, place.boxes)]
        super().__init__(source.Kind(torch.Size(place.shape), torch.float32), boxes, produce)


def save(folder: Path, tensors: dict[str, Produced], run: RunConfig, tokenizer: str | None, kept: Kept) -> Path:
    """Writes the checkpoint of step 0 of the run's folder. Raises UserError where the disk does not take it."""
    values = {
        "format": FORMAT,
        "step": 0,
        "rows": 0,
        "seed": run.train.seed,
        "data": None,
        "routers": {},
        "config": run.model_dump(mode="json"),
        KEPT: dataclasses.asdict(kept),
    } | ({} if tokenizer is None else {"tokenizer": tokenizer})
    path = series.step_folder(folder / "checkpoints", 0)
    store.save(path, {f"master/{name}": held for name, held in tensors.items()}, values)
    return path


def run_of(model: ModelConfig, target: Path, length: int, dtype: torch.dtype) -> RunConfig:
    """A run as one that has trained the model: its model part is true, the rest are starting values."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", target.absolute().name).lstrip("._-") or "converted"
    data = f"data/{name}"
    return RunConfig.model_validate(
        {
            "name": name,
            "runs": str(target.parent),
            "model": model.model_dump(),
            "data": {"path": data, "sources": ({"format": "text", "path": f"{data}/*.txt"},)},
            "train": {
                "steps": 1,
                "sequence_length": length,
                "global_batch_size": 1,
                "optimizer": {"lr": 1e-4},
                "evaluate": {"every": 1},
                "checkpoint": {"every": 1},
                "precision": "fp32" if dtype == torch.float32 else "bf16",
            },
        }
    )


def _wanted(
    batch: list[list[Link]], blocks: list[list[Tensor]], places: dict[str, Place], state: str
) -> dict[str, Pieces]:
    """The blocks of the links, as pieces of our masters or of another state."""
    found: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for link, block in zip(chain(*batch), chain(*blocks), strict=True):
        found.setdefault(link.ours, []).append((link.offset, block))
    return {f"{state}/{name}": Pieces(places[name].shape, torch.float32, held) for name, held in found.items()}


def _assembled(group: list[Link], blocks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Their tensor, of the blocks that are its shares."""
    if len(group) == 1:
        return group[0].to_theirs(blocks.pop().to(dtype))
    whole = torch.empty(group[0].their_shape, dtype=dtype)
    for link in group:
        whole[link.their_slices()] = link.to_theirs(blocks.pop(0))
    return whole


def _batches(links: list[Link]) -> Iterator[list[list[Link]]]:
    """Groups of links, each the shares of one tensor of theirs, as many together as are read at once."""
    groups: dict[str, list[Link]] = {}
    for link in links:
        groups.setdefault(link.theirs, []).append(link)
    batch: list[list[Link]] = []
    filled = 0
    for group in groups.values():
        size = sum(4 * math.prod(link.size) for link in group)
        if batch and filled + size > BATCH_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append(group)
        filled += size
    if batch:
        yield batch
