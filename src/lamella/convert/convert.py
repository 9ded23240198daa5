"""From a Hugging Face folder to a checkpoint of ours and back, a piece at a time; published at once or not at all."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lamella.config import ModelConfig, dump
from lamella.convert import extras
from lamella.convert.family import Family, Tree, family, family_for
from lamella.convert.map import Link, links, places
from lamella.convert.ours import Checkpoint, Kept, Produced, run_of, save
from lamella.convert.publish import published
from lamella.convert.read import CONFIG
from lamella.convert.theirs import ends, open_theirs, read_block
from lamella.convert.write import SHARD_BYTES, Kind, Kinds, write_binary, write_json, write_weights
from lamella.errors import UserError
from lamella.train.find import find_checkpoint
from lamella.train.restore import find_data, tokenizer_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
KNOWN = {word: dtype for dtype, word in WORDS.items()}
LONGEST = 2048  # tokens of a row that an imported model's run begins with


@dataclasses.dataclass(frozen=True)
class Converted:
    """`checkpoint` is ours, `theirs` the Hugging Face folder; `dtype` of the latter's weights, most of them.

    `rounded`: to what ours were rounded for it, None where nothing was.
    """

    family: Family
    model: ModelConfig
    checkpoint: Path
    theirs: Path
    dtype: torch.dtype
    rounded: torch.dtype | None
    notes: tuple[str, ...]


def to_lamella(source: Path, target: Path) -> Converted:
    """Makes `target`, a folder like a run's, with the checkpoint of step 0. `source`: a folder, or RWKV's .pth.

    Raises UserError: nothing to read there, damaged, a configuration that no stack here has, a tensor without a place
    or a place without a tensor, a target that is there already or that the disk does not take.
    """
    theirs = open_theirs(source)
    kind, tree, model, weights = theirs.family, theirs.tree, theirs.model, theirs.weights
    found, linked = places(model), theirs.links
    dtypes = {link.theirs: weights.dtype(link.theirs) for link in linked}
    sizes: Counter[torch.dtype] = Counter()
    for link in linked:
        sizes[dtypes[link.theirs]] += math.prod(link.size)
    dtype = sizes.most_common(1)[0][0]
    others = {name: WORDS[other] for name, other in dtypes.items() if other != dtype}
    by_name = theirs.by_name

    def produce(name: str) -> Any:
        return lambda offset, size: read_block(weights, by_name[name], offset, size)

    longest = tree.get("max_position_embeddings")
    run = run_of(model, target, min(longest, LONGEST) if isinstance(longest, int) and longest > 0 else LONGEST, dtype)
    with published(target) as folder:
        tokenizer = extras.take_in(source, folder)
        held = {name: Produced(place, produce(name)) for name, place in found.items()}
        path = save(folder, held, run, tokenizer, Kept(kind.name, tree, WORDS[dtype], others))
        dump(model, folder / "model.yaml")
    notes = () if tokenizer else (f"{source}: no tokenizer that ends a text, so generate and eval want --tokenizer",)
    return Converted(kind, model, target / path.relative_to(folder), source, dtype, None, notes)


def to_hf(
    source: Path, target: Path, dtype: str | None = None, name: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Converted:
    """Makes `target`, a folder that transformers reads. `dtype` None: what an imported model came in, else fp32.

    Raises UserError: no checkpoint, a damaged one, a stack that the family `name` (None: every family) does not have, a
    target that is there already or that the disk does not take.
    """
    path = find_checkpoint(source)
    ours = Checkpoint(path)
    model, kept = ours.run.model, ours.kept
    length = ours.run.train.sequence_length
    kind = family(name) if name else family_for(model, length, kept.family if kept else None)
    if kind.one_way:
        raise UserError(f"--family {kind.name}: is read, never written; name another, or none for the one that fits")
    tree, came = kind.write(model, length), _came(model, kind, kept)
    found = places(model)
    linked = links(found, kind.rows(came or tree), kind.layers(model), kind.name)
    ours.check_names(found)
    kinds = _kinds(linked, DTYPES.get(dtype or ""), kept, kind)
    to = max(kinds.values(), key=lambda one: one.bytes).dtype
    linked.sort(key=lambda link: -kinds[link.theirs].dtype.itemsize)
    with published(target) as folder:
        if kind.claims is None:
            tokenizer = tokenizer_folder(path, ours.values, find_data(path, ours.values, ours.run))
            tree = _common(model, kind) | extras.give_out(path.absolute().parent.parent, tokenizer, folder) | tree
        write_json(folder / CONFIG, _config(tree, came, kind, WORDS[to]))
        tensors = ours.theirs(linked, found, kinds)
        if kind.binary:
            head, embedding = ends(kind, model)
            twins = {head: embedding} if model.tie_embeddings else {}
            write_binary(folder, kinds, tensors, twins)
        else:
            write_weights(folder, kinds, tensors, shard_bytes)
    rounded = to if dtype == "bf16" else None
    notes = (f"weights rounded to {WORDS[to]}",) if rounded and (kept is None or kept.dtype != WORDS[to]) else ()
    return Converted(kind, model, path, target, to, rounded, notes)


def _came(model: ModelConfig, kind: Family, kept: Kept | None) -> Tree | None:
    """The config.json that the model came with, where it says this model."""
    came = kept is not None and kept.family == kind.name and kind.read(kept.config, kept.family) == model
    return kept.config if kept and came else None


def _config(made: Tree, came: Tree | None, kind: Family, dtype: str) -> Tree:
    """config.json: the one that the model came with, where it says these weights; else the one made."""
    tree = {k: v for k, v in (came or made).items() if k != "transformers_version"}
    said = tree.get("dtype", tree.get("torch_dtype"))
    if kind.claims is not None or (came and (said is None or said == dtype)):
        return tree
    return {k: v for k, v in tree.items() if k != "torch_dtype"} | {"dtype": dtype}


def _common(model: ModelConfig, kind: Family) -> Tree:
    return {
        "architectures": [kind.architecture],
        "model_type": kind.name,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }


def _kinds(linked: list[Link], dtype: torch.dtype | None, kept: Kept | None, kind: Family) -> Kinds:
    """Shape and dtype of each of theirs, wide ones first: of all that `dtype`, else as they came, else fp32."""
    others = {} if kept is None or dtype else {name: KNOWN[word] for name, word in kept.others.items()}
    usual = dtype or (torch.float32 if kept is None else KNOWN[kept.dtype])
    if others and (kind.binary or kept is None or kept.family != kind.name):  # all in one type, or under other names
        usual, others = torch.float32, {}
    kinds = {link.theirs: Kind(link.their_shape, others.get(link.theirs, usual)) for link in linked}
    return dict(sorted(kinds.items(), key=lambda item: -item[1].dtype.itemsize))
