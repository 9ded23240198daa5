"""From a checkpoint of Megatron-LM's to one of ours and back, a piece at a time."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.config import ModelConfig, check_options, dump
from lamella.convert.convert import DTYPES, KNOWN, LONGEST, WORDS
from lamella.convert.family import Keys
from lamella.convert.map import Link, links, places
from lamella.convert.match import match
from lamella.convert.megatron.arguments import is_hybrid, kinds_of, layers_of, pattern_of, to_ours
from lamella.convert.megatron.folder import Folder, says_nothing
from lamella.convert.megatron.names import Storage, numbers, objects, storage_of, table
from lamella.convert.megatron.to_arguments import to_arguments
from lamella.convert.megatron.write import write_iteration
from lamella.convert.ours import Checkpoint, Kept, Produced, run_of, save
from lamella.convert.publish import Done, published
from lamella.convert.theirs import read_block
from lamella.convert.write import Kind, Kinds
from lamella.errors import UserError
from lamella.model.stack import plan_layers
from lamella.train.find import find_checkpoint

NAME = "megatron"
MASTER = r"(?:chained_\d+\.)?optimizer\.state\.fp32_param\.(.+)"
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def from_megatron(source: Path, target: Path) -> Done:
    """Makes `target`, a folder like a run's, with the checkpoint of step 0.

    Raises UserError: no checkpoint of format torch_dist, damaged, a pickle that is more than data, arguments that no
    stack here has, a tensor without a place or a place without a tensor, a target that is there already.
    """
    theirs = Folder(source)
    form = storage_of(theirs.tensors)
    hybrid = is_hybrid(theirs.tensors)
    where = f"{theirs.folder / 'common.pt'}: args"
    keys = Keys(theirs.args, where, "Megatron-LM")
    if EMBEDDING not in theirs.tensors:
        raise UserError(f"{theirs.folder}: lacks {EMBEDDING}, so it is no language model of megatron-core's")
    layers = layers_of(theirs.tensors, keys.int("num_layers"), form.stacked)
    if (empty := next((i for i, kinds in enumerate(layers) if not kinds), None)) is not None:
        raise UserError(f"{theirs.folder}: layer {empty} has tensors of nothing that is known here")
    tied, rows = HEAD not in theirs.tensors, theirs.tensors[EMBEDDING].shape[0]
    if tied == bool(theirs.args.get("untie_embeddings_and_output_weights", not tied)):
        raise keys.refuse(f"untie_embeddings_and_output_weights={tied}, and {HEAD} is {'not ' * tied}there")
    model = check_options(ModelConfig, to_ours(keys, layers, hybrid, tied, rows), where)
    found = places(model)
    linked = links(found, table(form, hybrid), numbers(model, form, hybrid), NAME)
    _match(theirs, linked)
    masters = _masters(theirs, linked)
    by_name: dict[str, list[Link]] = {}
    for link in linked:
        taken = dataclasses.replace(link, theirs=masters.get(link.theirs, link.theirs))
        by_name.setdefault(link.ours, []).append(taken)

    def produce(name: str) -> Any:
        # It reads as `Weights` do.
        return lambda offset, size: read_block(theirs, by_name[name], offset, size)  # type: ignore[arg-type]

    dtype, others = _dtypes(theirs, linked)
    kept = {
        "args": _plain(theirs.args),
        "iteration": _iteration(theirs.common),
        "form": dataclasses.asdict(form),
        "hybrid": hybrid,
        "dtype": WORDS[dtype],
        "others": others,
        "objects": sorted(name for name in theirs.objects if "._extra_state" in name),
    }
    longest = theirs.args.get("max_position_embeddings")
    run = run_of(model, target, min(longest, LONGEST) if isinstance(longest, int) and longest > 0 else LONGEST, dtype)
    with published(target) as folder:
        held = {name: Produced(place, produce(name)) for name, place in found.items()}
        # To others than megatron the masters go as they are.
        said = ("float32", {}) if masters else (WORDS[dtype], others)
        path = save(folder, held, run, None, Kept(NAME, kept, *said))
        dump(model, folder / "model.yaml")
    notes = ["no tokenizer comes with it, so generate and eval want --tokenizer"]
    if masters:
        notes.insert(0, "the fp32 masters of its optimizer were taken, not the weights that it computes with")
    what = f"megatron-core's {'hybrid ' + pattern_of(model) if hybrid else 'GPT'}"
    return Done(target, what, dtype, target / path.relative_to(folder), model, tuple(notes))


def to_megatron(source: Path, target: Path, dtype: str | None = None) -> Done:
    """Makes `target`, a folder that Megatron-LM loads. `dtype` None: what an imported model came in, else fp32.

    Raises UserError: no checkpoint, a damaged one, a stack that neither megatron's GPT nor its hybrid has, a target
    that is there already or that the disk does not take.
    """
    path = find_checkpoint(source)
    ours = Checkpoint(path)
    model, kept = ours.run.model, ours.kept
    made = to_arguments(model, ours.run.train.sequence_length)
    came = _came(kept, model)
    hybrid = bool(came["hybrid"] if came else made["is_hybrid_model"])
    form = Storage(**came["form"]) if came else Storage(stacked=_uniform(model) and not hybrid)
    found = places(model)
    linked = links(found, table(form, hybrid), numbers(model, form, hybrid), NAME)
    ours.check_names(found)
    usual = came["dtype"] if came else kept.dtype if kept else "float32"
    kinds = _kinds(linked, came["others"] if came else {}, DTYPES.get(dtype or ""), KNOWN[usual])
    wide = max(kinds.values(), key=lambda one: one.bytes).dtype
    args = (came["args"] if came else made) | _precision(wide, came["args"] if came else {})
    content = {"singleton_local_shards": form.halves or form.experts == "numbered"}
    if not content["singleton_local_shards"] and not form.stacked:
        content["non_homogeneous_layers"] = True
    step = came["iteration"] if came else ours.values["step"]
    extra = came["objects"] if came else objects(model, form, hybrid)
    with published(target) as folder:
        write_iteration(folder, step, args, content, kinds, _pieces(ours, linked, found, kinds), extra)
    notes = ("optimizer state and random state do not go over: load with --no-load-optim --no-load-rng",)
    what = f"megatron-core's {'hybrid ' + pattern_of(model) if hybrid else 'GPT'}"
    return Done(target, what, wide, path, model, notes)


def _pieces(
    ours: Checkpoint, linked: list[Link], found: dict[str, Any], kinds: Kinds
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Their tensors; of a stack an item at a time."""
    items = {f"{link.theirs}@{link.stack}": link for link in linked}
    alone = [dataclasses.replace(link.alone, theirs=f"{link.theirs}@{link.stack}") for link in linked]
    kinds = {name: Kind(link.alone.their_shape, kinds[link.theirs].dtype) for name, link in items.items()}
    for name, block in ours.theirs(alone, found, kinds):
        link = items[name]
        if link.stack is None:
            yield link.theirs, (0,) * block.dim(), block
        else:
            yield link.theirs, (link.stack[0], *(0,) * block.dim()), block[None]


def _match(theirs: Folder, linked: list[Link]) -> None:
    """Every tensor of theirs has one place here, of its shape. Raises UserError for the first that has not."""
    what = "a model of its args"
    left = match(theirs.tensors, linked, theirs.folder, lambda name: theirs.folder, what, "its args")
    for name in sorted(left | theirs.objects - {link.theirs for link in linked}):
        if not says_nothing(name):
            raise UserError(f"{theirs.folder}: {name} has no place in {what}")


def _masters(theirs: Folder, linked: list[Link]) -> dict[str, str]:
    """Where the fp32 master of a weight of lower precision is: all of them, or none."""
    there = {match[1]: name for name in theirs.tensors if (match := re.fullmatch(MASTER, name))}
    low = {link.theirs for link in linked if theirs.dtype(link.theirs) != torch.float32}
    fits = {name: there[name] for name in low & there.keys() if _same(theirs, name, there[name])}
    return fits if len(fits) == len(low) else {}


def _same(theirs: Folder, name: str, master: str) -> bool:
    one = theirs.tensors[master]
    return one.dtype == torch.float32 and one.shape == theirs.tensors[name].shape


def _dtypes(theirs: Folder, linked: list[Link]) -> tuple[torch.dtype, dict[str, str]]:
    """Most elements', and those tensors' that differ."""
    sizes: Counter[torch.dtype] = Counter()
    for link in linked:
        sizes[theirs.dtype(link.theirs)] += math.prod(link.size)
    usual = sizes.most_common(1)[0][0]
    found = {link.theirs: theirs.dtype(link.theirs) for link in linked}
    return usual, {name: WORDS[dtype] for name, dtype in found.items() if dtype != usual}


def _kinds(linked: list[Link], others: dict[str, str], dtype: torch.dtype | None, usual: torch.dtype) -> Kinds:
    """Shape and dtype of each of theirs: of all that `dtype`, else as they came."""
    found = {link.theirs: dtype or KNOWN.get(others.get(link.theirs, ""), usual) for link in linked}
    return {link.theirs: Kind(link.their_shape, found[link.theirs]) for link in linked}


def _came(kept: Kept | None, model: ModelConfig) -> dict[str, Any] | None:
    """What a converted checkpoint came with, where it is of megatron's and says this model."""
    if kept is None or kept.family != NAME:
        return None
    hybrid, layers = kept.config["hybrid"], kinds_of(model)
    layers = [[kind] for kinds in layers for kind in kinds] if hybrid else layers
    keys = Keys(kept.config["args"], NAME, "Megatron-LM")
    again = check_options(ModelConfig, to_ours(keys, layers, hybrid, model.tie_embeddings, model.vocab_size), NAME)
    return kept.config if _shape(again) == _shape(model) else None


def _shape(model: ModelConfig) -> tuple:
    """What computes: layers may have been named and folded otherwise."""
    plans = [(plan.mixer, plan.channel) for plan in plan_layers(model)]
    return plans, model.model_dump(exclude={"parts", "stack"})


def _uniform(model: ModelConfig) -> bool:
    return len({type(plan.channel) for plan in plan_layers(model)}) == 1


def _iteration(common: dict[str, Any]) -> int:
    iteration = common.get("iteration", 0)
    return iteration if isinstance(iteration, int) and iteration >= 0 else 0


def _precision(dtype: torch.dtype, args: dict[str, Any]) -> dict[str, bool]:
    said = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    return {key: value for key, value in said.items() if bool(args.get(key)) != value}


def _plain(args: dict[str, Any]) -> dict[str, Any]:
    """Those that JSON can say."""
    return {name: value for name, value in args.items() if _says(value)}


def _says(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_says, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _says(item) for key, item in value.items())
    return value is None or (isinstance(value, bool | int | float | str) and value == value)
