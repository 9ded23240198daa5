"""The micro-batches that this process computes, read ahead of it by a thread."""

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from lamella.data.batch import Batch
from lamella.parallel.mesh import Mesh

WAIT = 0.2  # seconds after which a thread that is not asked any more looks up
Rows = tuple[list[int], Batch]  # a micro-batch: the rows' numbers inside the step, and the rows


class StepRows(Protocol):
    """Where a step's rows come from: fixed for the step, whoever computes them."""

    def batch(self, step: int, rows: Sequence[int]) -> Batch: ...

    def target_count(self, step: int) -> int: ...

    def deal(self, step: int, ranks: int) -> list[list[int]]: ...


class Feed:
    """A data rank's micro-batches, step by step. `ahead`: how many are read before they are asked for.

    Any step may be asked for; the one behind the last one asked for is there already.
    """

    def __init__(self, data: StepRows, mesh: Mesh, ahead: int = 0):
        self.data, self.mesh, self.ahead = data, mesh, ahead
        self._reader: _Reader | None = None
        self._next = -1  # the step that the reader is at, -1 inside one

    def target_count(self, step: int) -> int:
        return self.data.target_count(step)

    def step(self, step: int) -> Iterator[Rows]:
        """Yields the step's micro-batches, on this process's device. Raises what reading does."""
        device = self.mesh.device
        if not self.ahead:
            yield from ((numbers, batch.to(device)) for numbers, batch in self._read(step))
            return
        if self._reader is None or self._next != step:
            self.close()
            self._reader = _Reader(itertools.chain.from_iterable(map(self._read, itertools.count(step))), self.ahead)
        self._next = -1
        for _ in range(self.mesh.layout.micro_batch_count):
            numbers, batch = self._reader.take()
            yield numbers, batch.to(device)
        self._next = step + 1

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read(self, step: int) -> Iterator[Rows]:
        mesh = self.mesh
        mine = self.data.deal(step, mesh.layout.data)[mesh.data_rank]
        for numbers in mesh.layout.micro_batches(mine):
            batch = self.data.batch(step, numbers)
            yield numbers, batch.pin() if mesh.device.type == "cuda" else batch


class _Reader:
    """A thread that runs ahead through an iterator."""

    def __init__(self, source: Iterator[Rows], ahead: int):
        self._queue: queue.Queue[Rows | BaseException] = queue.Queue(ahead)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(source,), daemon=True, name="feed")
        self._thread.start()

    def take(self) -> Rows:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self, source: Iterator[Rows]) -> None:
        try:
            for item in source:
                if not self._put(item):
                    return
        except BaseException as error:  # told where the batch is asked for
            self._put(error)

    def _put(self, item: Rows | BaseException) -> bool:
        while not self._ended.is_set():
            try:
                self._queue.put(item, timeout=WAIT)
                return True
            except queue.Full:
                continue
        return False
