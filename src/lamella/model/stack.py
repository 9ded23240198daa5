"""From the words of a model file to the layers they mean: `parts` and `stack` -> a list of `LayerPlan`."""

import dataclasses
import difflib
from typing import Any

import lamella.channels.base
import lamella.mixers.base
from lamella.channels.base import ChannelConfig
from lamella.config import ModelConfig, check_options
from lamella.errors import UserError
from lamella.mixers.base import MixerConfig
from lamella.nn.depth import Depth
from lamella.nn.flops import Flops


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer: which mixer and channel mixer, either may be absent (`-`)."""

    index: int
    name: str  # as the stack writes it, "mamba/moe"
    mixer: MixerConfig | None
    channel: ChannelConfig | None
    depth: Depth

    def flops(self, d_model: int, length: int) -> Flops:
        """Forward operations of a row that is one document of `length` tokens."""
        mixer = Flops() if self.mixer is None else self.mixer.flops_at(d_model, length, self.depth)
        return mixer + (Flops() if self.channel is None else self.channel.flops(d_model, length))


def plan_layers(config: ModelConfig) -> list[LayerPlan]:
    """The stack unrolled, each part's options checked by its own file.

    Raises UserError: unknown part, mixer, channel mixer or option, a layer that is no `MIXER/CHANNEL`.
    """
    parts = {name: _part(name, options) for name, options in config.parts.items()}
    words = [word for block in config.stack for _ in range(block.repeat) for word in block.layers]
    plans, carried = [], frozenset[str]()
    for index, word in enumerate(words):
        plan = _layer(Depth(index, len(words), carried), word, parts)
        plans.append(plan)
        carried |= plan.mixer.carries(config.d_model).keys() if plan.mixer is not None else set()
    return plans


def _part(name: str, options: dict[str, Any]) -> MixerConfig | ChannelConfig:
    if ("mixer" in options) == ("channel" in options):
        raise UserError(f"model.parts.{name}: must name either a mixer or a channel, as in `mixer: attention`")
    kind, room = ("mixer", lamella.mixers.base) if "mixer" in options else ("channel", lamella.channels.base)
    known = room.names()
    if options[kind] not in known:
        near = difflib.get_close_matches(str(options[kind]), known, 1) or known
        raise UserError(f"model.parts.{name}.{kind}: no {kind} {options[kind]!r}; there is {', '.join(near)}")
    return check_options(room.config_of(options[kind]), options, f"model.parts.{name}")


def _layer(depth: Depth, word: str, parts: dict[str, MixerConfig | ChannelConfig]) -> LayerPlan:
    names = word.split("/")
    if len(names) != 2 or names == ["-", "-"]:
        raise UserError(f"model.stack: layer {word!r} must read MIXER/CHANNEL; one of the two may be -")
    found: list[Any] = []
    for name, kind in zip(names, (MixerConfig, ChannelConfig), strict=True):
        part = None if name == "-" else parts.get(name)
        if name != "-" and not isinstance(part, kind):
            what = "mixer" if kind is MixerConfig else "channel"
            fit = [n for n, p in parts.items() if isinstance(p, kind)]
            raise UserError(f"model.stack: {word!r}: {name} is no {what} of the parts; there is {', '.join(fit)}")
        found.append(part)
    return LayerPlan(depth.index, word, *found, depth=depth)
