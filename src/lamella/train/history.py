"""A run's metrics as columns over its steps: what the figures are drawn from.

Lines may lack keys (a run grows new ones, held-out loss comes now and then) and values may be NaN or infinite: a column
holds NaN for all of these. A step that was logged twice counts as its last line says.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

PARTS = ("data", "forward", "backward", "pipeline", "optimizer")  # of a step, in their order


class History:
    """`step` counts finished steps, as the terminal and the checkpoints do: a line's own step is one less."""

    def __init__(self, name: str, lines: list[dict[str, Any]], clip_norm: float | None = None):
        by_step = {line["step"]: line for line in lines}
        self.name, self.clip_norm = name, clip_norm
        self.lines = [by_step[s] for s in sorted(by_step)]
        self.step = np.array(sorted(by_step), dtype=np.int64) + 1

    def column(self, *keys: str) -> np.ndarray:
        """The numbers at `line[key][key]...`."""
        return np.array([_number(_at(line, keys)) for line in self.lines])

    def parts(self) -> list[str]:
        """The names under `seconds`, the known ones first."""
        found = {part for line in self.lines for part in line.get("seconds", {})}
        return [p for p in PARTS if p in found] + sorted(found.difference(PARTS))

    def layers(self) -> list[str]:
        """The mixtures of experts, in the order of the stack."""
        return in_order({layer for line in self.lines for layer in line.get("moe", {})})

    def sources(self) -> list[str]:
        """The sources that the loss is told apart by, in the data's order."""
        return list(dict.fromkeys(name for line in self.lines for name in line.get("sources", {})))

    def load(self, layer: str) -> np.ndarray:
        """[steps, experts]: each expert's share of the layer's tokens, 1 where it is even."""
        rows = [_at(line, ("moe", layer, "load")) or [] for line in self.lines]
        experts = max(len(row) for row in rows)
        blank = [np.nan] * experts
        return experts * np.array([row if len(row) == experts else blank for row in rows], dtype=float)


def in_order(layers: Iterable[str]) -> list[str]:
    """`layer2/channel` before `layer10/channel`."""
    return sorted(layers, key=lambda name: ([int(d) for d in re.findall(r"\d+", name)], name))


def label(layer: str) -> str:
    """`layer3/channel` in words."""
    numbers = re.findall(r"\d+", layer)
    return f"layer {numbers[0]}" if numbers else layer


class Bins:
    """At most `most` equal stretches of the steps, so that a picture of a million steps costs what it can show."""

    def __init__(self, step: np.ndarray, most: int):
        first, last = int(step[0]), int(step[-1])
        width = -(-(last - first + 1) // most)  # whole steps: stretches of 1 and 2 in turn would show as a pattern
        self.edges = np.arange(first, last + width + 1, width) - 0.5
        number = (step - first) // width
        self.filled, self.starts = np.unique(number, return_index=True)  # a gap in the steps leaves stretches empty
        self.center = ((self.edges[1:] + self.edges[:-1]) / 2)[self.filled]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Of each filled stretch, over its finite values."""
        known = np.isfinite(values)
        count = np.add.reduceat(known.astype(float), self.starts)
        total = np.add.reduceat(np.where(known, values, 0.0), self.starts)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def range(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest of each filled stretch."""
        return np.fmin.reduceat(values, self.starts), np.fmax.reduceat(values, self.starts)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[stretches, ...] with NaN for the empty ones, from values of the filled ones."""
        found = np.full((len(self.edges) - 1, *values.shape[1:]), np.nan)
        found[self.filled] = values
        return found


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a fiftieth of the run around each step, over what is finite there."""
    half = len(values) // 100
    known = np.isfinite(values)
    total = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    count = np.cumsum(np.concatenate([[0], known]))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half, len(values) - 1) + 1
    n = count[high] - count[low]
    return np.divide(total[high] - total[low], n, out=np.full(len(values), np.nan), where=n > 0)


def _at(line: dict[str, Any], keys: tuple[str, ...]) -> Any:
    found: Any = line
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else np.nan
