"""Their side: a folder of Hugging Face's or RWKV's .pth, matched with the stack of ours that it is."""

import dataclasses
import re
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lamella.config import ModelConfig
from lamella.convert.family import Family, Tree, family_of
from lamella.convert.map import Link, Slices, links, overlap, places
from lamella.convert.match import match
from lamella.convert.pth import derive_config
from lamella.convert.read import CONFIG, Weights, read_config
from lamella.errors import UserError


@dataclasses.dataclass(frozen=True)
class Theirs:
    """`tree` is config.json, `links` the table for all of its tensors."""

    path: Path
    family: Family
    tree: Tree
    model: ModelConfig
    weights: Weights
    links: list[Link]

    @cached_property
    def by_name(self) -> dict[str, list[Link]]:
        """The links of each tensor of ours."""
        found: dict[str, list[Link]] = {}
        for link in self.links:
            found.setdefault(link.ours, []).append(link)
        return found


def open_theirs(source: Path) -> Theirs:
    """Raises UserError: nothing to read there, damaged, a configuration that no stack here has, a tensor without a
    place or a place without a tensor.
    """
    file = source.is_file()
    weights = Weights(source) if file else None
    tree = derive_config(weights) if weights else read_config(source)
    where = f"{source}" if file else f"{source / CONFIG}"
    kind = family_of(tree, where)
    model = kind.read(tree, where)
    try:
        found = places(model)
    except UserError as error:  # sizes that do not divide
        raise UserError(f"{where}: {error}") from None
    linked = links(found, kind.rows(tree), kind.layers(model), kind.name)
    weights = weights or Weights(source)
    _match(weights, linked, kind, model, "its own sizes" if file else CONFIG)
    return Theirs(source, kind, tree, model, weights, linked)


def read_block(weights: Weights, linked: list[Link], offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """A box of one of our tensors, fp32, out of the tensors of theirs that it lies in."""
    block = torch.empty(size)
    for here, part in read_parts(weights, linked, offset, size):
        block[here] = part.float()
    return block


def read_parts(weights: Weights, linked: list[Link], offset: tuple[int, ...], size: tuple[int, ...]):
    """Where in a box of ours, and what of theirs lies there, in their dtype, one after the other."""
    for link in linked:
        common: tuple[Slices, Slices] | None = overlap(link, offset, size)
        if common is not None:
            inside, here = common
            yield here, link.to_ours(weights.read(link.theirs, link.their_slices(inside)))


def ends(kind: Family, model: ModelConfig) -> tuple[str, str]:
    """Their names of head and embedding."""
    place = places(model)["embedding.weight"]
    head, embedding = links({"head.weight": place, "embedding.weight": place}, kind.table, (), kind.name)
    return head.theirs, embedding.theirs


def _match(weights: Weights, linked: list[Link], kind: Family, model: ModelConfig, said: str) -> None:
    """Every tensor of theirs has one place here, of its shape. Raises UserError for the first that has not."""
    what = f"a {kind.name} of {said}"
    left = match(weights.tensors, linked, weights.folder, lambda name: weights.tensors[name].file, what, said)
    head, embedding = ends(kind, model)
    for name in sorted(left):
        if re.fullmatch(kind.extra, name):
            continue
        if model.tie_embeddings and name == head:
            if torch.equal(weights.read(head), weights.read(embedding)):
                continue
            raise UserError(f"{weights.folder}: {head} differs from {embedding}, and {said} says they are tied")
        raise UserError(f"{weights.folder}: {name} has no place in {what}")
