"""The weights that a new run begins with where `train.init_from` names another run's checkpoint, or something else that
has an `Origin`: what that may be is decided above, where a run is started.

Every tensor of the new model is one of the checkpoint, by name and shape, or stands where a dense layer becomes a
mixture of experts (sparse upcycling: Komatsuzaki et al. 2022, arXiv 2212.05055): each expert begins as a copy of the
MLP, the router at its own initial values. Anything else, here or there, is refused. Only weights are taken, and the
biases of routers that are taken too: optimizer, step and data begin anew.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamella.channels import mlp, moe
from lamella.checkpoint import store
from lamella.checkpoint.planner import Pieces
from lamella.config import ModelConfig, RunConfig
from lamella.errors import UserError
from lamella.model.lm import LanguageModel
from lamella.model.stack import LayerPlan, plan_layers
from lamella.nn.shard import placed_parameters
from lamella.train.balance import Balance
from lamella.train.find import find_checkpoint
from lamella.train.restore import read_run

CURE = "take the model that it holds, or that one with an mlp made a moe"


class Origin(ABC):
    """Weights of a model by the names of its parameters. `path` finds it again; `tokenizers`: digests of those that
    give its ids, none where unknown; `routers`: what each kept.
    """

    path: str
    model: ModelConfig
    tokenizers: frozenset[str]
    routers: dict[str, Any]

    @abstractmethod
    def fit(self, model: ModelConfig, length: int) -> None:
        """Raises UserError where it can be told without tensors that `model`, of rows of `length`, cannot begin so."""

    @abstractmethod
    def read(self, wanted: dict[str, Pieces]) -> None:
        """Into the views of each parameter, fp32; all processes together. Raises UserError, on all the same."""


Open = Callable[[str], Origin]


class Saved(Origin):
    """A checkpoint, or the newest of a run's folder. Raises UserError, on all processes: none there; another version's.
    """

    def __init__(self, name: str):
        where = Path(name)
        self.checkpoint = store.together(lambda: find_checkpoint(where), where)[0]  # it may not be the newest for long
        values, run = read_run(self.checkpoint)
        self.path, self.model = str(self.checkpoint), run.model
        self.tokenizers = frozenset([values["tokenizer"]] if "tokenizer" in values else [])
        self.routers = values.get("routers", {})

    def fit(self, model: ModelConfig, length: int) -> None:
        pass  # options that have no tensor may change

    def read(self, wanted: dict[str, Pieces]) -> None:
        store.load(self.checkpoint, {f"master/{name}": pieces for name, pieces in wanted.items()}, partial=True)


@dataclasses.dataclass(frozen=True)
class Start:
    """`sources`: parameter -> the tensor it begins as; one of another name is the MLP that every expert copies. What is
    not there keeps its own initial value. `routers`: what those routers kept that the origin has.
    """

    origin: Origin
    sources: dict[str, str]
    routers: dict[str, Any]


def find_start(run: RunConfig, tokenizer: str, opened: Open = Saved) -> Start | None:
    """What `run` begins with, if `train.init_from` says; all processes together. `tokenizer`: the digest of the data's,
    `opened`: what a name means.

    Raises UserError: nothing there, of another tokenizer, or of a model that this one cannot begin as.
    """
    if run.train.init_from is None:
        return None
    origin = opened(run.train.init_from)
    path = origin.path
    if origin.tokenizers and tokenizer not in origin.tokenizers:
        raise UserError(f"{path}: was trained with another tokenizer than {run.data.path} has; prepare data with that")
    origin.fit(run.model, run.train.sequence_length)
    sources = _sources(path, origin.model, run.model)
    kept = {f"layer{name.split('.')[1]}/channel" for name in sources if name.endswith(".channel.router.weight")}
    return Start(origin, sources, {place: state for place, state in origin.routers.items() if place in kept})


@torch.no_grad()
def fill(start: Start, model: nn.Module, balance: Balance) -> None:
    """Reads this process's part of the parameters, fp32 and not yet the optimizer's; all processes together."""
    wanted, copied = {}, []
    for name, parameter in placed_parameters(model):
        if name not in start.sources:
            continue
        shape, source = parameter.place.shape, start.sources[name]
        held = [(box.whole, parameter.data[box.local_slices]) for box in parameter.place.boxes]
        if source != name:
            shape, held = shape[1:], [(offset[1:], view[0]) for offset, view in held]  # into the first expert here
            copied.append(parameter)
        wanted[source] = Pieces(shape, torch.float32, held)
    start.origin.read(wanted)
    for parameter in copied:
        parameter[1:] = parameter[0].clone()
    balance.restore(start.routers)


def _sources(path: str, old: ModelConfig, new: ModelConfig) -> dict[str, str]:
    there, here, moved = _shapes(old), _shapes(new), _moved(path, old, new)
    found = {}
    for name, shape in here.items():
        source = moved.get(name, name)
        if source is None:
            continue
        needed = shape[1:] if name in moved else shape
        if source not in there:
            cure = "leave out shared_d_ff: no mlp becomes a shared expert" if ".channel.shared_" in name else CURE
            raise UserError(f"{path}: has no {source} for this model to begin with; {cure}")
        if there[source] != needed:
            cure = CURE
            if name in moved:
                width = there[f"{source.rsplit('.', 2)[0]}.w_out.weight"][-1]
                cure = f"give the experts the mlp's d_ff={width}"
            elif name in ("embedding.weight", "head.weight") and there[name][1:] == needed[1:]:
                cure = f"set model.vocab_size={there[name][0]}"
            raise UserError(f"{path}: {source} is {list(there[source])}, for {name} it must be {list(needed)}; {cure}")
        found[name] = source
    if left := there.keys() - set(found.values()):
        raise UserError(f"{path}: {next(n for n in there if n in left)} has no place in this model; {CURE}")
    return found


def _moved(path: str, old: ModelConfig, new: ModelConfig) -> dict[str, str | None]:
    """The parameters of mixtures that were an MLP -> the MLP's; the routers, which were nothing."""
    moved: dict[str, str | None] = {}
    for before, now in zip(plan_layers(old), plan_layers(new), strict=False):
        where, had = f"layers.{now.index}.channel", _activation(before)
        if had and _activation(now) and had != _activation(now):
            raise UserError(f"{path}: {where} computes {had}, and {_activation(now)} here; set activation={had}")
        if isinstance(before.channel, mlp.Config) and isinstance(now.channel, moe.Config):
            moved[f"{where}.router.weight"] = None
            moved[f"{where}.experts.w_out"] = f"{where}.w_out.weight"
            moved[f"{where}.experts.w_in"] = f"{where}.w_in.weight"
    return moved


def _activation(plan: LayerPlan) -> str | None:
    return getattr(plan.channel, "activation", None)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: p.place.shape for name, p in placed_parameters(LanguageModel(config))}
