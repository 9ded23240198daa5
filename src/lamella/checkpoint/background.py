"""Saves that training does not wait for: it stops for a copy, a thread writes and publishes it.

One save runs at a time. The copies are kept from save to save: fresh memory costs more than the copy into it.
"""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lamella.checkpoint import store
from lamella.checkpoint.files import Produce
from lamella.checkpoint.planner import Pieces


class Background:
    """Collective over all processes, as `store.save`; its collectives run in a gloo group of their own."""

    def __init__(self) -> None:
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.kept: dict[str, Pieces] = {}
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way here; on another process it may be done."""
        return self.thread is not None and self.thread.is_alive()

    def save(
        self,
        path: Path,
        tensors: dict[str, Pieces],
        values: dict[str, Any],
        beside: dict[str, Produce],
        then: Callable[[], None],
    ) -> None:
        """Copies and returns. `then` is called once it is published; `finish` comes before the next save."""
        assert self.thread is None and self.failure is None, "finish() first"
        self.kept = {name: pieces.snapshot(self.kept.get(name)) for name, pieces in tensors.items()}
        args = path, copy.deepcopy(values), beside, then
        # A daemon: where training fails, the process ends without waiting for ranks that may be gone.
        self.thread = threading.Thread(target=self._write, args=args, name=f"save {path.name}", daemon=True)
        self.thread.start()

    def finish(self) -> Exception | None:
        """Waits for the save under way. What it failed with, which is the same on every process."""
        if self.thread is not None:
            self.thread.join()
        failure, self.thread, self.failure = self.failure, None, None
        return failure

    def _write(
        self, path: Path, values: dict[str, Any], beside: dict[str, Produce], then: Callable[[], None]
    ) -> None:
        try:
            store.save(path, self.kept, values, self.group, beside)
            then()
        except Exception as error:
            self.failure = error
