"""What the model tests build on: filled modules, packed rows, one rank of a group without the group."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamella.model.init import generator
from lamella.nn.draw import Draw
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, Whole


def double() -> Whole:
    return Whole(dtype=torch.float64)


@torch.no_grad()
def filled(module, seed=0, spread=0.3):
    """Initial values plus noise by name: a norm at 1, a bias at 0 or weights of std 0.02 would hide a fault."""
    for name, parameter in module.named_parameters():
        random = generator(name, seed)
        parameter.copy_(parameter.place.init(random, parameter.place.shape))
        parameter.add_(spread * torch.randn(parameter.shape, generator=random))
    return module


def packed(rows, padding=(), row_numbers=None, **known) -> Rows:
    """Rows of documents of the given lengths, one list a row; `padding` says how many tokens end each row."""
    padding = padding or [0] * len(rows)
    document, position = [], []
    for lengths, end in zip(rows, padding, strict=True):
        document.append([d for d, n in enumerate(lengths) for _ in range(n)] + [-1] * end)
        position.append([p for n in lengths for p in range(n)] + list(range(end)))
    if row_numbers is not None:
        known["draw"] = Draw(seed=7, step=3, row_B=torch.tensor(row_numbers))
    return Rows(torch.tensor(document, dtype=torch.int32), torch.tensor(position, dtype=torch.int32), **known)


def some(rows: Rows, rows_at=slice(None), time=slice(None)) -> Rows:
    """Some rows, or a stretch of time of them."""
    return Rows(rows.document_BT[rows_at, time], rows.position_BT[rows_at, time])


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(ours, theirs) -> float:
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).detach().double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


class OneOf(Whole):
    """Rank `rank` of `size`, for everything that needs no communication: parameters, places, shapes."""

    def __init__(self, rank: int, size: int, num_layers: int = 1):
        Shard.__init__(self, rank, size, torch.float32, 0.02, num_layers)
