"""From a checkpoint to a model that can be used: one process, no optimizer, no process group, no training framework.

A checkpoint holds the fp32 masters by their global names, so the whole model is read whatever layout wrote it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from lamella.channels.moe.experts import Experts
from lamella.checkpoint import store
from lamella.checkpoint.planner import Pieces
from lamella.config import ModelConfig, RunConfig, change
from lamella.data.store.manifest import MANIFEST, Manifest, read_manifest
from lamella.data.tokenizer import FILES, Tokenizer, read_model
from lamella.errors import UserError
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from lamella.nn.linear import Column, Embedding, Row
from lamella.nn.shard import Whole, placed_parameters
from lamella.train.balance import Balance
from lamella.train.find import find_checkpoint

FORMAT = 1  # that state.py writes; to import it from there is to import DeepSpeed
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIVE = "give the one it was trained with: --tokenizer FILE"


@dataclasses.dataclass(frozen=True)
class Restored:
    """`run.data.path` is where the run's data lies now, if it was found. `notes` are lines that a user should see."""

    model: LanguageModel
    run: RunConfig
    tokenizer: Tokenizer
    checkpoint: Path
    step: int
    notes: tuple[str, ...]


def restore(
    where: Path | str,
    dtype: Literal["fp32", "bf16"] | None = None,
    tokenizer: Path | str | None = None,
    capacity: bool = True,
) -> Restored:
    """The model on `Whole`, whole and without gradients, on this machine's device; its configuration and tokenizer.

    `where` is a checkpoint, or a run's folder for its newest. `dtype` is what the model computes in (None: as it was
    trained), `tokenizer` a file or folder instead of the data's. With `capacity` off no expert turns a token away.

    Raises UserError: no checkpoint there, a damaged one, one of another format; a tokenizer that is missing or is not
    the one of training.
    """
    path = find_checkpoint(Path(where))
    values, run = read_run(path)
    notes = []
    if not capacity and (limited := [n for n, part in run.model.parts.items() if part.get("capacity_factor")]):
        parts = {n: part | ({"capacity_factor": None} if n in limited else {}) for n, part in run.model.parts.items()}
        run = change(run, model=run.model.model_dump(mode="json") | {"parts": parts})
        notes.append(f"{', '.join(limited)}: routed without capacity_factor, which is defined over whole rows alone")
    data = find_data(path, values, run)
    found = _tokenizer(path, values, run, data, tokenizer)
    if data is not None:
        run = change(run, data=run.data.model_dump(mode="json") | {"path": str(data[0])})
    if _fingerprint(values, data) is None:
        notes.append(f"{tokenizer}: taken as given; the run's own data, which tells its tokenizer, is not there")
    choosing = [n for n, part in run.model.parts.items() if part.get("routing") == "expert_choice"]
    if choosing and not capacity:
        raise UserError(
            f"{path}: {', '.join(choosing)}: experts choose among a whole row's tokens, later ones too, so text cannot"
            " be continued token by token; `lamella eval` works"
        )
    model = load_model(path, run.model, DTYPES[dtype or run.train.precision])
    Balance(run.model, model).restore(values.get("routers", {}))
    return Restored(model, run, found, path, values["step"], tuple(notes))


def read_run(path: Path) -> tuple[dict[str, Any], RunConfig]:
    """The plain values of a checkpoint and the run that saved it. Raises UserError as `restore` does."""
    values = store.read_values(path)
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: format {values.get('format')}, this version reads {FORMAT}")
    try:
        return values, RunConfig.model_validate_json(json.dumps(values["config"]))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: its configuration is of another version (at {key}); read it with that one") from None


def load_model(path: Path, config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    """The weights of a checkpoint, on this machine's device. Raises UserError as `restore` does."""
    model = LanguageModel(config, Whole(dtype, config.init_std, len(plan_layers(config))))
    model.requires_grad_(False)
    wanted = {
        f"master/{name}": Pieces(p.place.shape, torch.float32, [((0,) * p.dim(), p.data)])
        for name, p in placed_parameters(model)
    }
    store.load(path, wanted, partial=True)
    if dtype != torch.float32:
        _round_once(model, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _round_once(model: LanguageModel, dtype: torch.dtype) -> None:
    """Weights that every use rounds to the stream's dtype, rounded now: the same numbers in half the memory.

    What computes in fp32 keeps its weights: norms, routers, scans, and projections inside a branch, as Mamba's of dt.
    """
    for module in model.modules():
        if isinstance(module, Row | Embedding | Experts) or (isinstance(module, Column) and module.enter):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def find_data(path: Path, values: dict[str, Any], run: RunConfig) -> tuple[Path, Manifest] | None:
    """The run's prepared data: seen from where the run was started, else from here; that of training before another."""
    home, inside = path.absolute().parent.parent, run.folder.parts
    places = [Path(run.data.path)]
    if not run.folder.is_absolute() and home.parts[-len(inside) :] == inside:
        places.insert(0, home.parents[len(inside) - 1] / run.data.path)
    found = [(place, read_manifest(place)) for place in places if (place / MANIFEST).is_file()]
    same = [pair for pair in found if pair[1].fingerprint == values["data"]]
    return next(iter(same + found), None)


def _fingerprint(values: dict[str, Any], data: tuple[Path, Manifest] | None) -> str | None:
    """The digest of the tokenizer of training, where it can be known."""
    if "tokenizer" in values:
        return values["tokenizer"]
    return data[1].tokenizer if data is not None and data[1].fingerprint == values["data"] else None


def tokenizer_folder(path: Path, values: dict[str, Any], data: tuple[Path, Manifest] | None) -> Path | None:
    """The folder with the tokenizer of training: the run's, where a converted one has it, else its data's."""
    known = _fingerprint(values, data)
    places = [path.absolute().parent.parent] + ([data[0]] if data is not None else [])
    return next((place for place in places if known and _stored(place) == known), None)


def _stored(folder: Path) -> str | None:
    """The fingerprint of the tokenizer in a folder, if there is a whole one."""
    try:
        return read_model(folder).fingerprint
    except UserError:
        return None


def _tokenizer(
    path: Path, values: dict[str, Any], run: RunConfig, data: tuple[Path, Manifest] | None, given: Path | str | None
) -> Tokenizer:
    known = _fingerprint(values, data)
    if given is None:
        given = tokenizer_folder(path, values, data)
    if given is None:
        if data is None:
            raise UserError(f"{run.data.path}: no prepared data there, so no tokenizer for {path}; {GIVE}")
        if known is None:
            raise UserError(f"{data[0]}: not the data that {path} was trained on, nor surely its tokenizer; {GIVE}")
        given = data[0]
        if gone := [given / n for n in FILES if n in data[1].files and not (given / n).is_file()]:
            raise UserError(f"{gone[0]}: missing; {GIVE}")
    stored = read_model(given)
    if known is not None and stored.fingerprint != known:
        raise UserError(f"{given}: not the tokenizer of {path}; {GIVE}")
    tokenizer = stored.open()
    if tokenizer.vocab_size > run.model.vocab_size:
        size = run.model.vocab_size
        raise UserError(f"{given}: has {tokenizer.vocab_size} pieces, the model of {path} knows {size}; {GIVE}")
    return tokenizer
