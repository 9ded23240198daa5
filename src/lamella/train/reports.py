"""What the first rank tells of a run: the metrics file, which is the truth, and whoever shows it."""

import threading
from typing import Any

from lamella.config import RunConfig, dump
from lamella.parallel.layout import Layout
from lamella.train.figures import draw, draw_layout_aside
from lamella.train.layout_record import FILE, describe
from lamella.train.metrics_file import MetricsFile
from lamella.train.say import say
from lamella.train.terminal import View
from lamella.train.tracking import Tracker


class Reports:
    """From step `step` on; what was logged from there on before is forgotten. `packed`: see MetricsFile."""

    def __init__(self, config: RunConfig, layout: Layout, step: int, packed: bytes | None = None):
        self.folder = config.folder
        dump(config, config.folder / "config.yaml")
        self.metrics = MetricsFile(config.folder / "metrics.jsonl", step, packed)
        self.view = View(config, layout, step)
        self.drawing = self._begin_drawing(config, layout)
        self.tracker = Tracker(config, step) if config.tracking.enabled else None

    def step(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)
        self.view.step(line)

    def close(self, stopped: bool) -> None:
        if self.drawing is not None:
            self.drawing.join()
        try:
            draw(self.folder)
        except Exception as error:  # a picture that cannot be drawn costs no run its exit code
            _not_drawn("figures were", error)
        self.view.close(stopped)
        if self.tracker is not None:
            self.tracker.close(stopped)

    def _begin_drawing(self, config: RunConfig, layout: Layout) -> threading.Thread | None:
        try:
            describe(config, layout).save(self.folder / FILE)
            return draw_layout_aside(self.folder)
        except Exception as error:
            _not_drawn("figure of the layout was", error)
            return None


def _not_drawn(what: str, error: Exception) -> None:
    why = " ".join(str(error).split())
    say(f"the {what} not drawn ({type(error).__name__}: {why})")
