"""What a sequence mixer is, and how its file is found.

`mixer: NAME` in a part is the file `mixers/NAME.py`. The file holds the mixer whole: its mathematics, parameters,
sharding, initial values, state for step-by-step use, FLOPs, and the model of its options, a `Config` whose `build`
makes the module. Adding a mixer is adding that file.

Shapes: B batch, T time, D model width, H heads, K head size, I inner channels, N state, R rank.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn

import lamella.mixers
from lamella.config import Strict
from lamella.nn.depth import Depth
from lamella.nn.flops import Flops
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard

# What a mixer keeps between calls of one document; {} before the first token. Every value is a tensor, rows first.
State = dict[str, Any]


class Mixer(nn.Module, ABC):
    """A branch that mixes over time: stream in, stream out."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        """With a state (a dict this call updates in place) the rows continue where the last call ended."""


class MixerConfig(Strict, ABC):
    """The options of one mixer; the file's `Config` derives from it and says `mixer: Literal["NAME"]`."""

    mixer: str

    @abstractmethod
    def build(self, d_model: int, norm_eps: float, shard: Shard) -> Mixer:
        """The module. Raises UserError where sizes do not divide."""

    def build_at(self, d_model: int, norm_eps: float, shard: Shard, depth: Depth) -> Mixer:
        """`build` for a layer of a stack; a mixer whose parameters or initial values depend on it overrides this."""
        return self.build(d_model, norm_eps, shard)

    def carries(self, d_model: int) -> dict[str, int]:
        """What the mixer hands on to later layers in `rows.carried`, or reads there: name -> width.

        A tensor [B, T, width], its channels split over the tensor group. The first layer that names it makes it, once
        a forward; layers may also lie in different stages of a pipeline.
        """
        return {}

    @abstractmethod
    def flops(self, d_model: int, length: int) -> Flops:
        """Forward operations of a row that is one document of `length` tokens."""

    def flops_at(self, d_model: int, length: int, depth: Depth) -> Flops:
        """`flops` for a layer of a stack."""
        return self.flops(d_model, length)

    @abstractmethod
    def shrink(self, tensor: int) -> Self:
        """The same kind of mixer at the smallest sizes that `tensor` ranks still divide, for `lamella verify`."""


def names() -> list[str]:
    """The mixers there are."""
    return sorted(m.name for m in pkgutil.iter_modules(lamella.mixers.__path__) if m.name != "base")


def config_of(name: str) -> type[MixerConfig]:
    return importlib.import_module(f"lamella.mixers.{name}").Config
