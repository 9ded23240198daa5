"""The live view of a run as a rich renderable: told every step on the training thread, drawn on another."""

import itertools
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text

from lamella.train.history import PARTS, in_order, label

LEVELS = "▁▂▃▄▅▆▇█"
FILLS = "·░▒▓█"  # of the parts of a step; told apart without colour
COLOURS = ("white", "cyan", "blue", "magenta", "yellow")
LABEL = 10  # columns


class Trace:
    """A course of numbers in at most 2 x `most` means: when they are full, neighbours are merged."""

    def __init__(self, most: int = 256):
        self.most, self.stride, self.means, self.pending = most, 1, list[float](), list[float]()

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self.pending.append(value)
        if len(self.pending) == self.stride:
            self.means.append(statistics.fmean(self.pending))
            self.pending.clear()
        if len(self.means) == 2 * self.most:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self.stride *= 2

    def line(self, width: int) -> str:
        """The means as `width` bars or fewer."""
        n = min(width, len(self.means))
        cuts = [i * len(self.means) // n for i in range(n + 1)] if n > 0 else []
        values = [statistics.fmean(self.means[a:b]) for a, b in itertools.pairwise(cuts)]
        low, high = min(values, default=0.0), max(values, default=0.0)
        return bars([(v - low) / (high - low) if high > low else 0.0 for v in values])


class Screen:
    """`add` a line of metrics; rich asks for the picture at the console's width and height of the moment."""

    def __init__(self, title: str, step: int, steps: int):
        self.title, self.first, self.done, self.steps = title, step, step, steps
        self.start = time.monotonic()
        self.losses, self.recent, self.speeds = Trace(), deque[float](maxlen=20), deque[float](maxlen=101)
        self.began: float | None = None
        self.last: dict[str, Any] = {}
        self.heldout: dict[str, Any] = {}
        self.lock = threading.Lock()

    def add(self, line: dict[str, Any]) -> None:
        with self.lock:
            self.done, self.last = line["step"] + 1, line
            self.losses.add(line["loss"])
            self.recent.append(line["loss"])
            self.speeds.append(line["tokens_per_second"])
            if self.began is None:
                self.began = line["loss"]
            if "heldout_loss" in line:
                self.heldout = line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        with self.lock:
            rows = list(self._rows(options.max_width, console.size.height))
        for row in rows:
            row.no_wrap, row.overflow = True, "ellipsis"
            yield row
        yield Text()  # where the shell goes on, should the process be killed

    def _rows(self, width: int, height: int) -> Iterator[Text]:
        yield Text(self.title, "bold")
        yield self._progress(width)
        if not self.last:
            yield _row("", "the first step is under way")
            return
        line, began = self.last, self.began or 0.0
        loss, end = f"{statistics.fmean(self.recent):.4f}   ", f"   from {began:.4f}"
        yield _row("loss", loss, (self.losses.line(width - LABEL - len(loss) - len(end)), "green"), end)
        yield _row("held-out", self._heldout())
        yield _row("rate", f"{line['lr']:.2e}   gradient norm {line['grad_norm']:.3f}")
        median = statistics.median(self.speeds)
        yield _row("speed", f"{line['tokens_per_second']:,.0f} tokens/s   median {median:,.0f}")
        yield from _time(line.get("seconds", {}), width)
        yield from _sources(line.get("sources", {}))
        yield from _experts(line.get("moe", {}), width, height - 12)

    def _progress(self, width: int) -> Text:
        elapsed, trained = time.monotonic() - self.start, self.done - self.first
        left = f", {clock(elapsed / trained * (self.steps - self.done))} left" if trained else ""
        share = self.done / self.steps
        text = f"{self.done:,} of {self.steps:,}   "
        end = f"   {share:5.1%}   {clock(elapsed)}{left}"
        room = max(0, width - LABEL - len(text) - len(end))
        full = round(share * room)
        return _row("step", text, ("█" * full, "green"), ("░" * (room - full), "dim"), end)

    def _heldout(self) -> str:
        if not self.heldout:
            return "-"
        line = self.heldout
        bits = line.get("heldout_bits_per_byte")
        words = f"   {bits:.4f} bits per byte" if bits is not None else ""
        return f"{line['heldout_loss']:.4f}{words}   at step {line['step'] + 1:,}"


def bars(shares: Sequence[float]) -> str:
    """One bar for each share of the full height."""
    return "".join(LEVELS[min(len(LEVELS) - 1, max(0, int(s * len(LEVELS))))] if s == s else " " for s in shares)


def clock(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _row(name: str, *pieces: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{name:<{LABEL}}", "bold"), *pieces)


def _time(seconds: dict[str, float], width: int) -> Iterator[Text]:
    """A bar split by the parts of the step, and its legend."""
    total = sum(seconds.values())
    if not total > 0:
        return
    parts = sorted(seconds, key=lambda p: PARTS.index(p) if p in PARTS else len(PARTS))
    text = f"{1000 * total:,.0f} ms   "
    room = max(0, width - LABEL - len(text))
    ends = [0]
    for i in range(len(parts)):
        ends.append(round(room * sum(seconds[p] for p in parts[: i + 1]) / total))
    kinds = [(FILLS[i % len(FILLS)], COLOURS[i % len(COLOURS)]) for i in range(len(parts))]
    pieces = [(fill * (ends[i + 1] - ends[i]), colour) for i, (fill, colour) in enumerate(kinds)]
    yield _row("time", text, *pieces)
    words = [
        (f"{fill} {p} {seconds[p] / total:.0%}   ", colour) for p, (fill, colour) in zip(parts, kinds, strict=True)
    ]
    yield _row("", *words)


def _sources(found: dict[str, dict[str, Any]]) -> Iterator[Text]:
    """Each source's loss, and its share of the step's tokens."""
    if found:
        total = sum(one["tokens"] for one in found.values()) or 1
        seen = {name: one for name, one in found.items() if one["tokens"]}
        words = [f"{name} {one['loss']:.4f} ({one['tokens'] / total:.0%})" for name, one in seen.items()]
        yield _row("sources", "   ".join(words))


def _experts(layers: dict[str, dict[str, Any]], width: int, most: int) -> Iterator[Text]:
    """A line a layer, the least even first where there is no room for all. A bar of half the height is an even load."""
    if not layers:
        return
    fullest = {name: max(values["load"]) * len(values["load"]) for name, values in layers.items()}
    shown = in_order(layers)
    if len(shown) > max(1, most):
        shown = sorted(shown, key=lambda name: -fullest[name])[: max(1, most - 1)]
    room = min(max(len(layers[name]["load"]) for name in shown), max(8, width - 52))
    room = max(room, len("load by expert"))
    yield Text(f"{'experts':<{LABEL}}{'load by expert':<{room}}   fullest   entropy of even   dropped", "bold")
    for name in shown:
        values, load = layers[name], _narrow(layers[name]["load"], room)
        even = math.log(len(values["load"])) or 1.0
        numbers = f"{fullest[name]:6.2f}x{values['entropy'] / even:18.1%}{values['dropped']:10.1%}"
        drawn = bars([x * len(values["load"]) / 2 for x in load])
        yield Text.assemble(f"{label(name):<{LABEL}}", (f"{drawn:<{room}}", "cyan"), "   ", numbers)
    if len(shown) < len(layers):
        yield _row("", f"and {len(layers) - len(shown)} layers that are more even")


def _narrow(load: Sequence[float], width: int) -> list[float]:
    """At most `width` of the loads, the highest of each stretch."""
    n = min(width, len(load))
    return [max(load[i * len(load) // n : (i + 1) * len(load) // n]) for i in range(n)]
