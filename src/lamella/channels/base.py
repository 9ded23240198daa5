"""What a channel mixer is, and how it is found: `channel: NAME` in a part is `channels/NAME`, a file or a folder."""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn

import lamella.channels
from lamella.config import Strict
from lamella.nn.depth import Depth
from lamella.nn.flops import Flops
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard


class Channel(nn.Module, ABC):
    """A branch that mixes over channels, each token by itself (a router may look at the whole row).

    `state` is the layer's, as a mixer has it: a channel that looks at the token before keeps what it needs under a name
    of its own, `channel_...`.
    """

    @abstractmethod
    def forward(self, x_BTD: Tensor, rows: Rows, state: dict[str, Any] | None = None) -> Tensor: ...


class ChannelConfig(Strict, ABC):
    """The options of one channel mixer; the file's `Config` derives from it and says `channel: Literal["NAME"]`."""

    channel: str

    @abstractmethod
    def build(self, d_model: int, shard: Shard, place: str) -> Channel:
        """The module; `place` names it in the model, for random draws and metrics. Raises UserError as sizes demand."""

    def build_at(self, d_model: int, shard: Shard, place: str, depth: Depth) -> Channel:
        """`build` for a layer of a stack; a channel mixer whose initial values depend on it overrides this."""
        return self.build(d_model, shard, place)

    @abstractmethod
    def flops(self, d_model: int, length: int) -> Flops:
        """Forward operations of a row of `length` tokens."""

    @abstractmethod
    def shrink(self, tensor: int, expert: int) -> Self:
        """The same kind of channel mixer at small sizes that `tensor` ranks, and experts that `expert` ranks, divide;
        its random draws on.
        """


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(lamella.channels.__path__) if m.name != "base")


def config_of(name: str) -> type[ChannelConfig]:
    return importlib.import_module(f"lamella.channels.{name}").Config
