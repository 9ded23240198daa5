"""Initial values by global name: the same model under every layout."""

import hashlib

import torch
from torch import Generator, Tensor, nn

from lamella.nn.shard import Place, placed_parameters


def generator(name: str, seed: int) -> Generator:
    """The random stream that belongs to one parameter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def draw_local(name: str, place: Place, seed: int) -> Tensor:
    """This rank's part of the parameter's initial value, fp32: drawn whole, then cut by its boxes."""
    return cut(place.init(generator(name, seed), place.shape), place)


def cut(whole: Tensor, place: Place) -> Tensor:
    """This rank's part of a global tensor."""
    local = whole.new_empty(place.local_shape)
    for box in place.boxes:
        local[box.local_slices] = whole[box.whole_slices]
    return local


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fills every parameter of the model."""
    for name, parameter in placed_parameters(model):
        parameter.copy_(draw_local(name, parameter.place, seed))
