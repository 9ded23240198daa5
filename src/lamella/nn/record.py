"""Sums that parts of the model leave behind for a step's metrics."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Record:
    """Named sums, fp64, over the micro-batches of a step; a forward that is only repeated adds nothing."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._paused = False

    def add(self, name: str, value: Tensor) -> None:
        if not self._paused:
            value = value.detach().double()
            self.values[name] = self.values[name] + value if name in self.values else value

    @contextmanager
    def pause(self) -> Iterator[None]:
        was, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = was
