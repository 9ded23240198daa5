"""The mean of several checkpoints' weights (Polyak & Juditsky 1992; of a run's last ones: Izmailov et al. 2018,
arXiv 1803.05407), written as a checkpoint of its own.

It holds masters and no moments: to generate, evaluate, convert or begin a new run with, not to continue. Biases of
routers are averaged too: they are part of what the model computes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoint import store
from lamella.checkpoint.source import Offset, Produced, Source
from lamella.errors import UserError

MASTER = "master/"


def average(paths: list[Path], target: Path, weights: list[float] | None = None) -> None:
    """Writes the mean of the checkpoints, each with its weight, at `target`, in fp64, a piece of each at a time.

    Raises UserError: damaged, or not of one model and tokenizer.
    """
    shares = torch.tensor(weights or [1.0] * len(paths), dtype=torch.float64)
    shares = (shares / shares.sum()).tolist()
    sources = [Source(path) for path in paths]
    first, last = sources[0], store.read_values(paths[-1])
    for source in sources[1:]:
        _check_alike(first, source)

    def mean(name: str, offset: Offset, size: Offset) -> Tensor:
        total = torch.zeros(size, dtype=torch.float64)
        for source, share in zip(sources, shares, strict=True):
            total += share * source.read(name, offset, size).double()
        return total.to(first.kinds[name].dtype)

    made = {
        name: Produced(kind, first.boxes(name), lambda offset, size, name=name: mean(name, offset, size))
        for name, kind in first.kinds.items()
        if name.startswith(MASTER)
    }
    routers = [store.read_values(path).get("routers", {}) for path in paths]
    values = last | {"routers": _mean(routers, shares), "averaged": [str(path) for path in paths]}
    store.save(target, made, {key: value for key, value in values.items() if key != "heldout_loss"})


def _check_alike(a: Source, b: Source) -> None:
    ours, theirs = ({n: k for n, k in s.kinds.items() if n.startswith(MASTER)} for s in (a, b))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            both = f"{ours.get(name) or 'not there'} in {a.path}, {theirs.get(name) or 'not there'} in {b.path}"
            raise UserError(f"{name.removeprefix(MASTER)}: {both}; average checkpoints of one model")
    one, two = (store.read_values(s.path).get("tokenizer") for s in (a, b))
    if one != two and None not in (one, two):
        raise UserError(f"{a.path} and {b.path} were trained with different tokenizers; their weights mean other words")


def _mean(trees: list[Any], shares: list[float]) -> Any:
    """Of numbers, element by element, in trees of one form."""
    if isinstance(trees[0], dict):
        return {key: _mean([tree[key] for tree in trees], shares) for key in trees[0]}
    if isinstance(trees[0], list):
        return [_mean(list(items), shares) for items in zip(*trees, strict=True)]
    return sum(share * number for share, number in zip(shares, trees, strict=True))
