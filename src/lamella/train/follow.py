"""Reads a run's metrics as they grow and sends them to its store, whatever the store does."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import IO, Any

from lamella.config import RunConfig
from lamella.errors import UserError
from lamella.train.mlflow_store import NoMlflow, Store, now
from lamella.train.say import say

POLL_SECONDS = 2.0
LONGEST_WAIT = 60.0  # seconds between two tries to reach a store
SYSTEM_SECONDS = 5.0  # at least, between two looks at the machine
LINES = 200  # held at once


class End:
    """Whether the run has ended, and with which status in MLflow."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.status = ""

    def set(self, status: str) -> None:
        self.status = status
        self.event.set()


class Tail:
    """Reads a growing metrics file on, and from its start again where it was replaced."""

    def __init__(self, path: Path):
        self.path = path
        self.file: IO[bytes] | None = None

    def rewind(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None

    def read(self, limit: int = LINES) -> list[tuple[dict[str, Any], int]]:
        """The next whole lines, each with its time in milliseconds. Raises UserError on a damaged one.

        The newest line was written when the file was; a line's time before that follows from the steps' seconds.
        """
        # The open file keeps its inode number from being given to another one.
        if self.file is None or self.path.stat().st_ino != os.fstat(self.file.fileno()).st_ino:
            self.rewind()
            self.file = self.path.open("rb")
        start, raw = self.file.tell(), []
        while len(raw) < limit and (line := self.file.readline()).endswith(b"\n"):
            raw.append(line)
        size = sum(map(len, raw))
        self.file.seek(start + size)
        if not raw:
            return []
        lines = [self._parse(line) for line in raw]
        seconds = [sum(line.get("seconds", {}).values()) for line in lines]
        found = os.fstat(self.file.fileno())
        rest = max(0, found.st_size - start - size) / size  # of the file, in chunks like this one
        moment = found.st_mtime - rest * sum(seconds)
        times = []
        for passed in reversed(seconds):
            times.append(int(1000 * moment))
            moment -= passed
        return list(zip(lines, reversed(times), strict=True))

    def _parse(self, line: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                return found
        raise UserError(f"{self.path}: a line is damaged ({line[:40].decode(errors='replace')}...); mend or remove it")


class Follower:
    """Sends a run's lines and files to its store. `trainer`: the process that trains it, where it is known."""

    def __init__(self, folder: Path, config: RunConfig, store: Store, end: End, trainer: int | None = None):
        self.config, self.store, self.end, self.trainer = config, store, end, trainer
        self.tail = Tail(folder / "metrics.jsonl")
        self.chunk: list[tuple[dict[str, Any], int]] = []
        self.machine = Machine(trainer) if trainer is not None else None
        self.last: tuple[int, int] = (-1, now())  # the newest step sent, and its time
        self.said = False
        self.files_wait = 0.0

    def follow(self) -> None:
        """Until the end, and all is sent; a store that fails is tried again, ever more seldom, and reported once.

        Where no trainer will tell, the run's last step is its end.
        """
        wait = POLL_SECONDS
        while True:
            ended = self.end.event.is_set()  # asked before reading: what was written before it is read below
            try:
                if self.turn(running=True):
                    continue
                if ended:
                    return self.finish()
                wait = POLL_SECONDS
                if self.trainer is None and self.complete:
                    self.end.set("FINISHED")
            except (UserError, NoMlflow):
                raise
            except Exception as error:  # MLflow, its database and its server raise whatever they like
                self.store.disconnect()
                self._say(error)
                wait = min(2 * wait, LONGEST_WAIT)
            time.sleep(POLL_SECONDS / 2) if ended else self.end.event.wait(wait)

    @property
    def complete(self) -> bool:
        """Whether the configured last step has been sent."""
        return self.last[0] + 1 >= self.config.train.steps

    def turn(self, running: bool) -> bool:
        """Sends some lines, and files when all lines are sent. Returns whether there may be more lines already."""
        if self.store.client is None and self.store.connect(self._begun(), running):
            self.tail.rewind()  # the store has lost what it had
            self.chunk = []
        again = bool(self.chunk)
        if not again:
            self.chunk = self.tail.read()
            if self.chunk and self.machine is not None and len(self.chunk) < LINES:
                line, moment = self.chunk[-1]
                self.chunk[-1] = (line | self.machine.look(), moment)
        if self.chunk:
            # Kept until it is acknowledged: sent again it is the same to the millisecond, which databases take once.
            self.store.send(self.chunk)
            self.last = (self.chunk[-1][0]["step"], self.chunk[-1][1])
            more, self.chunk = again or len(self.chunk) == LINES, []
            if more:
                return True
        self._send_files()
        return False

    def finish(self) -> None:
        """Marks how the run ended. A stop that came with the last step was none."""
        status = "FINISHED" if self.end.status == "KILLED" and self.complete else self.end.status
        self.store.end(status, self.last[1])

    def _send_files(self) -> None:
        """Files apart: a store that takes metrics may have no place for files."""
        if time.monotonic() < self.files_wait and not self.end.event.is_set():
            return
        try:
            self.store.send_files()
        except Exception as error:
            self._say(error, "files of ")
            self.files_wait = time.monotonic() + LONGEST_WAIT

    def _begun(self) -> int:
        tail = Tail(self.tail.path)
        first = tail.read(1)
        tail.rewind()
        return first[0][1] - int(1000 * sum(first[0][0].get("seconds", {}).values())) if first else now()

    def _say(self, error: Exception, what: str = "") -> None:
        if not self.said:
            why = " ".join(str(error).split())[:150]
            say(f"MLflow at {self.store.uri} does not take the {what}run {self.config.name} ({why}); it is tried again")
        self.said = True


class Machine:
    """How busy the machine and the training process are, under MLflow's own names."""

    def __init__(self, pid: int):
        self.pid, self.looked = pid, time.monotonic()
        with contextlib.suppress(ImportError):
            import psutil

            psutil.cpu_percent()  # counts from here on

    def look(self) -> dict[str, Any]:
        """{"system": {...}}, or nothing where the last look was not long ago."""
        if time.monotonic() - self.looked < SYSTEM_SECONDS:
            return {}
        self.looked = time.monotonic()
        try:
            import psutil

            memory = psutil.virtual_memory()
            found = {
                "cpu_utilization_percentage": psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / 1e6,
                "system_memory_usage_percentage": memory.percent,
                "trainer_memory_megabytes": psutil.Process(self.pid).memory_info().rss / 1e6,
            }
        except Exception:  # no psutil, or the trainer is gone
            return {}
        return {"system": found}
