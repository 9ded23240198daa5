"""Where a layer lies in the stack: what initial values and parameters may depend on besides their shape."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Depth:
    """Layer `index` of `count`; `carried` names what earlier layers hand on in `rows.carried`."""

    index: int = 0
    count: int = 1
    carried: frozenset[str] = frozenset()

    @property
    def rising(self) -> float:
        """0 at the first layer, 1 at the last."""
        return self.index / max(1, self.count - 1)

    @property
    def falling(self) -> float:
        """1 at the first layer, 1 / count at the last."""
        return 1 - self.index / self.count
