"""Encoding on all cores: results in the order of the tasks, a bounded number of which is under way.

The first megabytes are encoded in this process, so that a small corpus starts no other.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lamella.data.prepare import worker
from lamella.data.prepare.encode import Encoded, Encoder
from lamella.data.sources.interrupted import Interrupted
from lamella.data.tokenizer import load

ALONE = 4_000_000  # bytes encoded here
PIPE = 1 << 20  # bytes: a task goes through in one piece
AHEAD = 2  # tasks under way for each process
Tagged = Iterator[tuple[list[bytes], Any]]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`with Workers(...) as workers: for encoded, tag in workers.map(tasks): ...`. They end with the block."""

    def __init__(self, folder: Path, dtype: np.dtype, heldout: float, count: int | None = None):
        """`folder` holds the tokenizer; `count` processes (None: as many as cores; one works here)."""
        self._begin = (str(folder), dtype, heldout)
        self._count = count or cores()
        self._here = Encoder(load(folder), dtype, heldout)
        self._alone = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._local, self._lock = threading.local(), threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for process in self._processes:
                process.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def map(self, tasks: Tagged) -> Iterator[tuple[Encoded, Any]]:
        """Yields the result of each task with its tag. Raises Interrupted when a process dies."""
        waiting: deque[tuple[Future[Encoded], Any]] = deque()
        for raws, tag in tasks:
            if self._count == 1 or self._alone < ALONE:
                self._alone += sum(map(len, raws))
                yield self._here(raws), tag
                continue
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._count)
            waiting.append((self._threads.submit(self._ask, raws), tag))
            if len(waiting) >= AHEAD * self._count:
                future, first = waiting.popleft()
                yield future.result(), first
        for future, tag in waiting:
            yield future.result(), tag

    def _ask(self, raws: list[bytes]) -> Encoded:
        """In a thread, which has a process of its own."""
        process = getattr(self._local, "process", None) or self._start()
        assert process.stdin and process.stdout
        try:
            worker.send(process.stdin, raws)
            return worker.receive(process.stdout)
        except (EOFError, OSError):
            code = process.wait()
            raise Interrupted(
                f"a process that encodes ended with code {code}, for want of memory perhaps; run it with fewer cores "
                "(taskset -c 0) or more memory"
            ) from None

    def _start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join([p for p in sys.path if p])
        alone = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | alone,
        )
        with self._lock:
            self._processes.append(process)
        assert process.stdin and process.stdout
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, AttributeError):  # a limit; not Linux
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)
        worker.send(process.stdin, self._begin)
        self._local.process = process
        return process


def tasks(batches: Tagged, size: int) -> Tagged:
    """Joins batches to tasks of at least `size` bytes; a task's tag is its last batch's."""
    raws, held = [], 0
    tag = None
    for some, tag in batches:
        raws += some
        held += sum(map(len, some))
        if held >= size:
            yield raws, tag
            raws, held = [], 0
    if raws:
        yield raws, tag
