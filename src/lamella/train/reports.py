"""What the first rank tells of a run: the metrics file, which is the truth, and whoever shows it."""

import sys
from typing import Any

from lamella.config import RunConfig, dump
from lamella.train.figures import draw
from lamella.train.metrics import MetricsFile
from lamella.train.terminal import View
from lamella.train.tracking import Tracker


class Reports:
    """From step `step` on; what was logged from there on before is forgotten."""

    def __init__(self, config: RunConfig, step: int):
        self.folder = config.folder
        dump(config, config.folder / "config.yaml")
        self.metrics = MetricsFile(config.folder / "metrics.jsonl", step)
        self.view = View(config, step)
        self.tracker = Tracker(config, step) if config.tracking.enabled else None

    def step(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)
        self.view.step(line)

    def close(self, stopped: bool) -> None:
        try:
            draw(self.folder)
        except Exception as error:  # a picture that cannot be drawn costs no run its exit code
            why = " ".join(str(error).split())
            print(f"the figures were not drawn ({type(error).__name__}: {why})", file=sys.stderr, flush=True)
        self.view.close(stopped)
        if self.tracker is not None:
            self.tracker.close(stopped)
