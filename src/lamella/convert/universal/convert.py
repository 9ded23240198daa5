"""From a universal folder of DeepSpeed's to a checkpoint of ours and back: masters, moments and step.

Its parameters are named as here, or as megatron-core names its modules. What the model is says a `model.yaml` in the
folder, or Megatron-LM's `args` among the model states. A folder that was made here holds the checkpoint's values too,
so what comes back is the checkpoint that went.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lamella.channels.moe.experts import Experts
from lamella.checkpoint import series, store
from lamella.config import ModelConfig, RunConfig, check_options, dump, load_model
from lamella.convert.convert import LONGEST
from lamella.convert.family import Keys
from lamella.convert.map import Link, links, overlap, places
from lamella.convert.megatron.arguments import is_hybrid, layers_of, to_ours
from lamella.convert.megatron.names import Storage, numbers, storage_of, table
from lamella.convert.megatron.to_arguments import to_arguments
from lamella.convert.ours import KEPT, Checkpoint, Kept, Produced, run_of
from lamella.convert.publish import Done, published
from lamella.convert.read import FLOATS
from lamella.convert.universal.folder import MOMENTS, Folder
from lamella.convert.universal.write import split_of, write_universal
from lamella.convert.write import Kind
from lamella.errors import UserError
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from lamella.nn.linear import Row
from lamella.nn.shard import Place, placed_parameters
from lamella.train.find import find_checkpoint
from lamella.train.restore import FORMAT

NAME, VALUES, MODEL = "universal", "lamella", "model.yaml"
OURS, MEGATRON, HEAD = "embedding.weight", "embedding.word_embeddings.weight", "output_layer.weight"
MODULES = Storage(experts="gemms", split=False)  # of a GPT or hybrid of Transformer Engine's layers


def from_universal(source: Path, target: Path) -> Done:
    """Makes `target`, a folder like a run's, with the checkpoint of the folder's step, moments with it.

    Raises UserError: no universal folder, damaged, a pickle that is more than data, nothing that says what model it is,
    a parameter without a place or a place without one, a target that is there already.
    """
    theirs = Folder(source)
    prefix, megatron = _naming(theirs)
    names = [name.removeprefix(prefix) for name in theirs.names]
    form = storage_of(names) if megatron else None
    model = _model(theirs, source, names, form)
    found = places(model)
    linked = _linked(model, found, form, is_hybrid(names), prefix)
    head, embedding = (prefix + name for name in ((HEAD, MEGATRON) if megatron else ("head.weight", OURS)))
    moments = _match(theirs, linked, (head, embedding) if model.tie_embeddings else None)
    values, run = _values(theirs, model, target)
    step = theirs.step if moments else 0
    if values is None:
        kept = {"names": "megatron" if megatron else "ours", "prefix": prefix, "step": theirs.step}
        kept |= {"form": dataclasses.asdict(form) if form else None, "hybrid": is_hybrid(names)}
        rows = step * run.train.global_batch_size
        values = {"format": FORMAT, "rows": rows, "seed": run.train.seed, "data": None, "routers": {}}
        values |= {"config": run.model_dump(mode="json"), KEPT: dataclasses.asdict(Kept(NAME, kept, "float32", {}))}
    by_name: dict[str, list[Link]] = {}
    for link in linked:
        by_name.setdefault(link.ours, []).append(link)

    def produce(name: str, state: str) -> Any:
        return lambda offset, size: _block(theirs, state, by_name[name], offset, size)

    with published(target) as folder:
        held = {
            f"{kind}/{name}": Produced(place, produce(name, state))
            for kind, state in (("master", "fp32"), *((moment, moment) for moment in moments))
            for name, place in found.items()
        }
        path = series.step_folder(folder / "checkpoints", step)
        store.save(path, held, values | {"step": step})
        dump(model, folder / MODEL)
    had = f"masters and moments of step {step}" if moments else "masters, no moments"
    return Done(target, f"DeepSpeed's universal, {had}", torch.float32, target / path.relative_to(folder), model, ())


def to_universal(source: Path, target: Path, names: str | None = None) -> Done:
    """Makes `target`, a folder that DeepSpeed loads with `load_universal`. `names`: `megatron` for its modules' names,
    None as a folder of DeepSpeed's came, else ours.

    Raises UserError: no checkpoint, a damaged one, a stack that megatron does not have, a target that is there already.
    """
    path = find_checkpoint(source)
    ours = Checkpoint(path)
    model = ours.run.model
    kept = ours.kept.config if ours.kept is not None and ours.kept.family == NAME else None
    kept = kept if kept and (names is None or names == kept["names"]) else None
    megatron = names == "megatron" or bool(kept and kept["names"] == "megatron")
    args = to_arguments(model, ours.run.train.sequence_length) if megatron else None
    form = Storage(**kept["form"]) if kept and kept["form"] else MODULES if megatron else None
    hybrid = bool(kept["hybrid"] if kept else args and args["is_hybrid_model"])
    found = places(model)
    linked = _linked(model, found, form, hybrid, kept["prefix"] if kept else "")
    ours.check_names(found)
    there = set(store.names(path))
    moments = tuple(m for m in MOMENTS if all(f"{m}/{name}" in there for name in found))
    step = ours.values["step"]
    values = {key: value for key, value in ours.values.items() if key != "step"}
    client: dict[str, Any] = {VALUES: json.dumps(values)}
    with published(target) as folder:
        if args is not None:
            client["args"] = argparse.Namespace(**args)
        splits, shapes = _splits(model, linked, found), {link.theirs: link.their_shape for link in linked}
        write_universal(folder, step, _tensors(ours, linked, found, moments), splits, shapes, client)
        dump(model, folder / MODEL)
    notes = () if len(moments) == len(MOMENTS) else ("it had no moments: they are zeros, as an optimizer begins",)
    had = f"step {step}, names of {'megatron-core' if megatron else 'this project'}"
    return Done(target, f"DeepSpeed's universal, {had}", torch.float32, path, model, notes)


def _naming(theirs: Folder) -> tuple[str, bool]:
    """What stands before every name, and whether the names are megatron's."""
    for known in (MEGATRON, OURS):
        for name in theirs.names:
            if name == known or name.endswith(f".{known}"):
                return name.removesuffix(known), known == MEGATRON
    raise UserError(f"{theirs.folder}: has neither {OURS} nor {MEGATRON}: its names are of no model known here")


def _model(theirs: Folder, source: Path, names: list[str], form: Storage | None) -> ModelConfig:
    for file in (theirs.folder / MODEL, source / MODEL):
        if file.is_file():
            model = load_model(file)
            plan_layers(model)
            return model
    text = theirs.client.get(VALUES)
    if form is None:
        try:
            return _checked(json.loads(text)["config"]["model"], f"{theirs.states}: {VALUES}")  # type: ignore[arg-type]
        except (TypeError, ValueError, KeyError):
            cure = f"put the model part of its run beside it as {theirs.folder / MODEL}"
            raise UserError(f"{theirs.states}: says nothing of its model; {cure}") from None
    args = theirs.client.get("args")
    if args is None or not hasattr(args, "state"):
        cure = f"put ours beside it as {theirs.folder / MODEL}"
        raise UserError(f"{theirs.states}: holds no args, Megatron-LM's arguments, which tell the model; {cure}")
    where = f"{theirs.states}: args"
    keys = Keys(args.state, where, "Megatron-LM")
    layers = layers_of(names, keys.int("num_layers"), stacked=False)
    embedding = theirs.entry(next(name for name in theirs.names if name.endswith(MEGATRON)))
    rows = math.prod(embedding.saved.shape) // keys.int("hidden_size") if embedding else 0
    return _checked(to_ours(keys, layers, is_hybrid(names), "output_layer.weight" not in names, rows), where)


def _checked(tree: Any, where: str) -> ModelConfig:
    model = check_options(ModelConfig, tree, where)
    plan_layers(model)
    return model


def _linked(model: ModelConfig, found: dict[str, Place], form: Storage | None, hybrid: bool, prefix: str) -> list[Link]:
    if form is None:
        linked = links(found, {"{rest}": "{rest}"}, (), NAME)
    else:
        linked = links(found, table(form, hybrid), numbers(model, form, hybrid), NAME)
    return [dataclasses.replace(link, theirs=prefix + link.theirs) for link in linked]


def _match(theirs: Folder, linked: list[Link], tied: tuple[str, str] | None) -> tuple[str, ...]:
    """Every parameter of theirs has one place here, of its size; a tied head's second name too, if it says the same.
    Returns the moments that are there.
    """
    wanted = {link.theirs: link for link in linked}
    for name, link in wanted.items():
        for state in ("fp32", *MOMENTS):
            entry = theirs.entry(name, state)
            if entry is None and state == "fp32":
                raise UserError(f"{theirs.folder}: lacks {name}, which its model has")
            if entry is not None and entry.saved.shape not in (link.their_shape, (math.prod(link.their_shape),)):
                shapes = f"is {list(entry.saved.shape)}, by its model it must be {list(link.their_shape)}"
                raise UserError(f"{entry.file}: {shapes}")
    for name in sorted(set(theirs.names) - wanted.keys()):
        if tied is None or name != tied[0]:
            raise UserError(f"{theirs.folder}: {name} has no place in its model")
        if not _copies(theirs, *tied):
            raise UserError(f"{theirs.folder}: {name} differs from {tied[1]}, and its model says they are tied")
    return tuple(m for m in MOMENTS if any(theirs.entry(name, m) for name in wanted))


def _copies(theirs: Folder, head: str, embedding: str) -> bool:
    """Is the head the embedding, or that as the engine computed with it?"""
    entries = [theirs.entry(name) for name in (head, embedding)]
    if None in entries:
        return entries[0] is None
    one, two = (entry.saved.tensor().reshape(-1) for entry in entries if entry is not None)
    return one.shape == two.shape and any(torch.equal(one, two.to(d).to(one.dtype)) for d in FLOATS.values())


def _values(theirs: Folder, model: ModelConfig, target: Path) -> tuple[dict[str, Any] | None, RunConfig]:
    """Those of the checkpoint that it was made of, where it says the same model."""
    try:
        values = json.loads(theirs.client[VALUES])
        run = RunConfig.model_validate_json(json.dumps(values["config"]))
        if run.model == model and values["format"] == FORMAT:
            return values, run
    except (KeyError, TypeError, ValueError, ValidationError):
        pass
    return None, run_of(model, target, LONGEST, torch.float32)


def _block(theirs: Folder, state: str, linked: list[Link], offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """A box of one of our tensors; zeros where a parameter never had a gradient, and so no moments."""
    block = torch.zeros(size)
    for link in linked:
        common = overlap(link, offset, size)
        if common is not None and theirs.entry(link.theirs, state) is not None:
            inside, here = common
            part = theirs.read(link.theirs, state, link.their_shape, link.their_slices(inside))
            block[here] = link.to_ours(part).float()
    return block


def _tensors(
    ours: Checkpoint, linked: list[Link], found: dict[str, Place], moments: Iterable[str]
) -> Iterator[tuple[str, str, Tensor]]:
    kinds = {link.theirs: Kind(link.their_shape, torch.float32) for link in linked}
    for state in ("master", *MOMENTS):
        if state == "master" or state in moments:
            for name, tensor in ours.theirs(linked, found, kinds, state):
                yield name, "fp32" if state == "master" else state, tensor
        else:
            for name, kind in kinds.items():
                yield name, state, torch.zeros(kind.shape)


def _splits(model: ModelConfig, linked: list[Link], found: dict[str, Place]) -> dict[str, dict[str, Any]]:
    with torch.device("meta"):
        built = LanguageModel(model)
    rows = {id(m.weight) for m in built.modules() if isinstance(m, Row)}
    stacks = {id(p): 1 + (p is m.w_out) for m in built.modules() if isinstance(m, Experts) for p in m.parameters()}
    dims = {name: stacks.get(id(p), int(id(p) in rows)) for name, p in placed_parameters(built)}
    return {link.theirs: split_of(link, found[link.ours], dims[link.ours]) for link in linked}
