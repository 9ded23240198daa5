"""Showing a run in MLflow while it trains, in a process of its own that reads `metrics.jsonl`.

    trainer ── appends ──> metrics.jsonl ── read ──> tracker ── batches ──> MLflow
       └───────── a pipe: how the run ended ───────────┘

The training process does nothing for it at a step: not MLflow's import, nor its writes, nor a dead server can slow one.
The tracker runs at low priority, outlives its trainer by ten seconds at most, and needs no word to end: when the
trainer is gone the pipe is closed.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lamella.config import RunConfig, load_run
from lamella.errors import UserError
from lamella.train.follow import End, Follower, Tail, say
from lamella.train.mlflow_store import NoMlflow, Store, find_uri
from lamella.train.note import Note

FLUSH_SECONDS = 10.0  # after the trainer's end
PRIORITY = 10  # niceness: a fully loaded machine still lets it in
STATUS = {"done": "FINISHED", "stopped": "KILLED", "": "FAILED"}  # by the trainer's last word


class Tracker:
    """The trainer's end: starts the tracker of a run that trains from `step` on, and tells it how the run ended."""

    def __init__(self, config: RunConfig, step: int, flush_seconds: float = FLUSH_SECONDS):
        self.config, self.flush_seconds = config, flush_seconds
        self.folder = config.folder.absolute()
        command = [sys.executable, "-m", "lamella.train.tracking", str(self.folder), str(step), str(flush_seconds)]
        self.child: subprocess.Popen[bytes] | None = None
        try:
            # A session of its own: Ctrl-C in the terminal is for the trainer.
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, bufsize=0
            )
        except OSError as error:
            say(f"no process for MLflow ({error}); the run goes on without, `lamella track {self.folder}` sends it")

    def close(self, stopped: bool) -> None:
        """Waits until everything has been sent, within bounds; the tracker says what is left."""
        if self.child is None:
            return
        assert self.child.stdin is not None
        with contextlib.suppress(OSError):  # it is gone
            self.child.stdin.write(b"stopped" if stopped else b"done")
        self.child.stdin.close()
        try:
            self.child.wait(self.flush_seconds + 2)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        if self.child.returncode != 0:
            with contextlib.suppress(UserError, OSError):  # a trained run has its exit code already
                say_left(self.folder, self.config)


def open_run(folder: Path) -> RunConfig:
    """The configuration of the run in a folder. Raises UserError where there is no run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds no run (no config.yaml); a run's folder is runs/NAME")
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: the run has no metrics.jsonl yet; train it first")
    return load_run(folder / "config.yaml")


@contextlib.contextmanager
def hold(folder: Path, wait: bool) -> Iterator[None]:
    """One tracker of a run at a time. Raises UserError where another one is at work and it is not waited for."""
    try:
        file = (folder / "tracking.lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({os.strerror(error.errno or 0)}), so nothing is sent") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder}: is being sent by another process, nothing to do") from None
        yield


def say_left(folder: Path, config: RunConfig) -> None:
    """Says what MLflow has not got, and how to send it; nothing where it has got everything."""
    uri = find_uri(folder, config.tracking.uri)
    note, tail, steps = Note.load(folder, config, uri), Tail(folder / "metrics.jsonl"), []
    while chunk := tail.read():
        steps += [line["step"] for line, _ in chunk if line["step"] >= note.next]
    if steps:
        what = f"steps {steps[0]} to {steps[-1]}"
        say(f"MLflow at {uri} has not got {what} of {config.name}; `lamella track {folder}` sends them")
    elif note.status not in STATUS.values():
        say(f"MLflow at {uri} has not got the end of {config.name}; `lamella track {folder}` sends it")


def replay(folder: Path, uri: str | None, follow: bool) -> Store:
    """Sends a run's metrics and files, once or until its last step. Returns the store that has them.

    Raises UserError where there is no run, its metrics are damaged, or the store does not take them.
    """
    config, end = open_run(folder), End()
    with hold(folder, wait=False):
        store = Store(folder, config, uri)
        follower = Follower(folder, config, store, end)
        try:
            if follow:
                follower.follow()
            else:
                while follower.turn(running=False):
                    pass
                end.set("FAILED" if store.note.status == "FAILED" and not follower.complete else "KILLED")
                follower.finish()
        except UserError:
            raise
        except NoMlflow as error:
            raise UserError(f"mlflow cannot be imported ({error}); pip install mlflow") from None
        except Exception as error:
            raise UserError(f"MLflow at {store.uri}: {' '.join(str(error).split())[:200]}") from None
    return store


def how_to_look(uri: str) -> str:
    """Where a person sees what a store holds."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri '{uri}'"


def _watch(folder: Path, config: RunConfig, end: End, flush_seconds: float) -> None:
    """Waits for the trainer's last word, or the end of its pipe; then this process has some seconds left."""
    end.set(STATUS[os.read(0, 64).decode()])
    time.sleep(flush_seconds)
    say_left(folder, config)
    os._exit(0)


def main(folder: Path, step: int, flush_seconds: float) -> None:
    """The tracker's process: follows the run in `folder`, that trains from `step` on in the parent process."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # meant for the trainer, whose end is awaited
    os.nice(PRIORITY)
    trainer = os.getppid()
    try:
        config = open_run(folder)
        end = End()
        threading.Thread(target=_watch, args=(folder, config, end, flush_seconds), daemon=True).start()
        with hold(folder, wait=True):
            store = Store(folder, config, start=step)
            Follower(folder, config, store, end, trainer).follow()
    except UserError as error:
        say(f"{error}; the run goes on without MLflow")
    except NoMlflow as error:
        say(f"mlflow cannot be imported ({error}); the run goes on without, `lamella track {folder}` sends it later")
    except Exception as error:  # as a file system without locks
        say(f"no MLflow for {folder} ({type(error).__name__}: {' '.join(str(error).split())[:150]})")
    sys.stderr.flush()
    os._exit(0)  # the thread may be waiting in a read


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
