"""What a run says while it trains: on a terminal a live view, elsewhere one plain line a step; a summary at the end."""

import math
import os
import statistics
import sys
import time
from array import array
from typing import Any

from rich.console import Console
from rich.live import Live

from lamella.config import RunConfig
from lamella.model.count import count
from lamella.parallel.layout import Layout
from lamella.train.screen import Screen, clock

REFRESH = 4  # a second


class View:
    """Shows the lines of metrics as they come."""

    def __init__(self, config: RunConfig, layout: Layout, step: int):
        self.config, self.layout, self.first, self.done = config, layout, step, step
        self.start = time.monotonic()
        self.tokens, self.speeds = 0, array("d")
        self.losses: tuple[float, float] | None = None
        self.heldout: dict[str, Any] = {}
        print(f"{config.name}: from step {step} of {config.train.steps}, in {config.folder}", flush=True)
        self.screen: Screen | None = None
        self.live: Live | None = None
        if draws_live() and step < config.train.steps:
            self._start(Console())

    def step(self, line: dict[str, Any]) -> None:
        """Takes a step's metrics; on a terminal another thread shows them."""
        self.done = line["step"] + 1
        self.tokens += line["tokens"]
        self.speeds.append(line["tokens_per_second"])
        self.losses = (self.losses[0] if self.losses else line["loss"], line["loss"])
        if "heldout_loss" in line:
            self.heldout = line
        if self.screen is not None:
            self.screen.add(line)
        else:
            print(plain(line, self.config.train.steps), flush=True)

    def close(self, stopped: bool) -> None:
        """The last word."""
        if self.live is not None:
            self.live.stop()
        print("\n".join(self._summary()), flush=True)
        if stopped:
            print(f"stopped at step {self.done} and saved; the same command continues", file=sys.stderr, flush=True)

    def _start(self, console: Console) -> None:
        self.screen = Screen(_title(self.config, self.layout), self.first, self.config.train.steps)
        self.live = Live(self.screen, console=console, refresh_per_second=REFRESH)
        self.live.start()
        console.show_cursor(True)  # rich hides it, and a process that is killed could not bring it back

    def _summary(self) -> list[str]:
        folder, trained = self.config.folder, self.done - self.first
        lines = [f"{self.config.name}: nothing to train, step {self.done} of {self.config.train.steps} is done"]
        if self.losses is not None:
            median = statistics.median(self.speeds)
            lines = [
                f"{self.config.name}: {trained:,} steps, {self.tokens:,} tokens in"
                f" {clock(time.monotonic() - self.start)}, median {median:,.0f} tokens/s",
                f"  training loss  {self.losses[0]:.4f} at step {self.first + 1:,},"
                f" {self.losses[1]:.4f} at step {self.done:,}",
            ]
        if self.heldout:
            lines.append(f"  held-out loss  {_heldout(self.heldout)} at step {self.heldout['step'] + 1:,}")
        lines.append(f"  run            {folder}")
        lines += [
            f"  {name:<15}{folder / name}"
            for name in ("checkpoints", "figures")
            if (folder / name).is_dir() and any((folder / name).iterdir())
        ]
        lines += ["next:", f"  lamella generate {folder} --prompt 'def main('", f"  lamella figures {folder}"]
        if self.config.tracking.enabled:
            lines.append(f"  lamella track {folder}")
        return lines


def draws_live() -> bool:
    """Whether standard output is a terminal that can move its cursor and show bars."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "") and encoding == "utf8"


def plain(line: dict[str, Any], steps: int) -> str:
    """A step in one line, for logs."""
    text = f"step {line['step'] + 1:>6}/{steps}  loss {line['loss']:.4f}  "
    text += f"grad {line['grad_norm']:.3f}  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
    if "heldout_loss" in line:
        text += f"  held-out {_heldout(line)}"
    return text


def _heldout(line: dict[str, Any]) -> str:
    bits = line.get("heldout_bits_per_byte", math.nan)
    return f"{line['heldout_loss']:.4f}" + ("" if math.isnan(bits) else f" ({bits:.4f} bits per byte)")


def _title(config: RunConfig, layout: Layout) -> str:
    sizes = count(config.model, config.train.sequence_length)
    active = f" ({sizes.active:,} active)" if sizes.active < sizes.parameters else ""
    return f"{config.name}   {sizes.parameters:,} parameters{active}   {layout}"
