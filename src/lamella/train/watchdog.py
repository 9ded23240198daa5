"""A process that takes no step for too long writes down where it stands, and ends.

A rank that hangs holds all others in their next collective, so every rank's stacks are there to compare. The thread
needs nothing of the training's: no collective, no memory, no lock.
"""

import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamella.config import HangConfig
from lamella.errors import EXIT_HUNG
from lamella.train.say import say

RECENT = 50  # steps whose median counts


class Watchdog:
    """Watches from the first `beat` on; `limits` None: nothing is watched."""

    def __init__(self, folder: Path, rank: int, limits: HangConfig | None):
        self.file, self.rank, self.limits = folder / "stacks" / f"rank-{rank}.txt", rank, limits
        self.taken: deque[float] = deque(maxlen=RECENT)
        self.last: float | None = None
        self.whole = False  # whether a step has run since `last` and nothing else
        self.closed = threading.Event()
        if limits is not None:
            threading.Thread(target=self._watch, args=(limits,), name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """A step is done."""
        now = time.monotonic()
        if self.last is not None and self.whole:
            self.taken.append(now - self.last)
        self.last, self.whole = now, True

    @contextmanager
    def off(self) -> Iterator[None]:
        """What is done inside is no step and takes as long as it takes."""
        self.last, self.whole = None, False
        yield
        self.last = time.monotonic()

    def close(self) -> None:
        self.closed.set()

    def limit(self, limits: HangConfig) -> float:
        """Seconds that a step may take now."""
        return max(limits.at_least, limits.times * statistics.median(self.taken) if self.taken else limits.at_least)

    def _watch(self, limits: HangConfig) -> None:
        while not self.closed.wait(min(1.0, limits.at_least / 4)):
            last = self.last
            if last is not None and time.monotonic() - last > self.limit(limits):
                self._end(time.monotonic() - last)

    def _end(self, seconds: float) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w") as file:
            file.write(f"rank {self.rank}: no step for {seconds:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        say(f"rank {self.rank}: no step for {seconds:.0f} s; its stacks are in {self.file}")
        os._exit(EXIT_HUNG)
