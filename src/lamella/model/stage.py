"""A pipeline's stages: which layers each holds, and what travels between them besides the stream."""

import dataclasses
import itertools

from lamella.config import ModelConfig
from lamella.model.stack import plan_layers


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of layers. The first stage begins with the embedding, the last ends with norm, head and loss."""

    index: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1


def make_stages(starts: tuple[int, ...], num_layers: int) -> tuple[Stage, ...]:
    """The stages of a stack whose later stages begin at layers `starts`."""
    edges = (0, *starts, num_layers)
    return tuple(Stage(i, len(edges) - 1, range(a, b)) for i, (a, b) in enumerate(itertools.pairwise(edges)))


def carried_into(config: ModelConfig, stage: Stage) -> dict[str, int]:
    """What the layers before a stage hand on to it or to a later one: name -> width, in a fixed order."""
    before: dict[str, int] = {}
    after: set[str] = set()
    for plan in plan_layers(config):
        carries = plan.mixer.carries(config.d_model) if plan.mixer is not None else {}
        if plan.index < stage.layers.start:
            before |= carries
        else:
            after |= carries.keys()
    return {name: before[name] for name in sorted(before) if name in after}
