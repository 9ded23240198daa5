"""When a run's checkpoints are written, what becomes of one that fails, and which stay: `train.checkpoint`.

A save that the disk does not take is told and costs nothing else: training goes on, the next one is tried. Only the
last one, which the end of the run or a signal asks for, must succeed.
"""

from functools import partial
from typing import Any

from lamella.checkpoint import series
from lamella.checkpoint.background import Background
from lamella.checkpoint.files import Produce
from lamella.checkpoint.mirror import Mirror
from lamella.checkpoint.planner import Pieces
from lamella.checkpoint.series import Keep
from lamella.config import RunConfig
from lamella.errors import UserError
from lamella.train.say import say


def mirror_of(config: RunConfig) -> Mirror | None:
    """Raises UserError where its URL is none."""
    url = config.train.checkpoint.mirror
    return None if url is None else Mirror(url)


class Saver:
    """All processes together; `first`: this one speaks, prunes and mirrors."""

    def __init__(self, config: RunConfig, first: bool, saved: int):
        """`saved`: the step that the run begins at, whose checkpoint there is."""
        options = config.train.checkpoint
        self.folder, self.every, self.waits = config.folder / "checkpoints", options.every, not options.background
        self.keep = Keep(options.keep, options.keep_every, options.keep_best)
        self.first, self.saved, self.begun = first, saved, saved
        self.mirror = mirror_of(config) if first else None
        self.background = Background()

    def save(self, step: int, tensors: dict[str, Pieces], values: dict[str, Any], beside: dict[str, Produce]) -> None:
        """Begins to publish the checkpoint of `step` finished steps, once; waits for the one before it."""
        self.settle(wait=True)
        if step == self.saved:
            return
        self.begun = step
        path = series.step_folder(self.folder, step)
        self.background.save(path, tensors, values, beside, partial(self._tidy, step))
        if self.waits:
            self.settle(wait=True)

    def settle(self, wait: bool = False) -> None:
        """Takes note of a save that has ended. Raises what is no fault of the disk."""
        if self.background.thread is None or (self.background.busy and not wait):
            return
        failure = self.background.finish()
        if failure is None:
            self.saved = self.begun
        elif not isinstance(failure, UserError):
            raise failure
        elif self.first:
            say(f"step {self.begun} is not saved, training goes on and saves again in {self.every} steps: {failure}")

    def close(self) -> None:
        """Waits for the last save. Raises UserError where the disk does not take it."""
        failure = self.background.finish()
        if failure is not None:
            raise failure

    def _tidy(self, step: int) -> None:
        """Of the first process, once a checkpoint is published. What fails here is told and tried after the next."""
        if not self.first:
            return
        try:
            deleted = series.prune(self.folder, self.keep)
            if self.mirror is not None:
                for old in deleted:
                    self.mirror.drop(series.step_folder(self.folder, old).name)
                for kept in series.steps(self.folder):
                    self.mirror.push(series.step_folder(self.folder, kept))
        except UserError as error:
            say(f"step {step} is saved, but: {error}")
