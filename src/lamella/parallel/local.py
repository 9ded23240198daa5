"""Starts some processes of this machine that run one function together, and waits for them.

They are forked from a server that has imported once what they need and run nothing, so a process starts in well under a
second and inherits no state. When one ends badly the others are ended, by pid.
"""

import dataclasses
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from lamella.errors import EXIT_FAULT, EXIT_REQUEUE, EXIT_USER, UserError

PRELOAD = "lamella.parallel.preload"
GRACE = 30.0  # seconds that the others get after one has ended badly


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one process ended: its exit code (negative: the signal), and what its function returned."""

    code: int
    value: Any


def run_local(
    nproc: int, function: Callable[..., Any], *args: Any, timeout: float | None = None, forward_signals: bool = False
) -> list[Outcome]:
    """Runs `function(*args)` in `nproc` processes with the environment that torchrun would give them.

    The function must be importable by name. A return value and a UserError come back through a pipe (the error is
    raised here); any other exception prints its traceback and exits 1, SystemExit exits with its code. With
    `forward_signals` SIGTERM and SIGINT go to the processes instead of this one. After `timeout` seconds all are
    killed.
    """
    context = multiprocessing.get_context("forkserver")
    ours_too = [name for name in sys.modules if name.split(".")[0] in ("lamella", "lamella_kernels")]
    context.set_forkserver_preload([PRELOAD, *ours_too])  # read once, when the server starts
    port = free_port()
    pipes, processes = [], []
    for rank in range(nproc):
        ours, theirs = context.Pipe(duplex=False)
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(
            target=_main, args=(theirs, dict(os.environ) | {k: str(v) for k, v in where.items()}, function, args)
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    if forward_signals:
        _forward([p.pid for p in processes])
    values = _collect(pipes, processes, timeout)
    for value in values:
        if isinstance(value, UserError):
            raise value
    return [Outcome(p.exitcode or 0, v) for p, v in zip(processes, values, strict=True)]


def exit_code(outcomes: list[Outcome]) -> int:
    """One exit code for all: a fault before a requeue before success."""
    codes = {o.code for o in outcomes}
    return EXIT_FAULT if codes - {0, EXIT_REQUEUE} else max(codes)


def end(code: int) -> NoReturn:
    """Ends this process without running destructors: those of process groups wait for peers that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """A port of this machine that nobody holds, of those that systems do not hand out by themselves (32768 and up):
    what other processes open meanwhile does not take it.
    """
    while True:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 29_500)))
            except OSError:
                continue
            return s.getsockname()[1]


def _collect(pipes: list[Connection], processes: list[Any], timeout: float | None) -> list[Any]:
    """Waits for all to end; once one has failed the others have `GRACE` seconds, and `timeout` bounds everything."""
    values: list[Any] = [None] * len(pipes)
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    deadline = None if timeout is None else time.monotonic() + timeout
    # One look decides and says what to wait for: after a second one nothing may be left to end the wait.
    while alive := [p.sentinel for p in processes if p.is_alive()]:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        for ready in wait([*open_pipes, *alive], timeout=left):
            if ready in open_pipes:
                _receive(ready, open_pipes, values)
        if any(p.exitcode not in (None, 0, EXIT_REQUEUE) for p in processes):
            deadline = min(deadline or float("inf"), time.monotonic() + GRACE)
        if deadline is not None and time.monotonic() >= deadline:
            for process in processes:
                if process.is_alive():
                    process.kill()
            break
    for process in processes:
        process.join()
    for pipe in list(open_pipes):
        _receive(pipe, open_pipes, values)
    return values


def _receive(pipe: Any, open_pipes: dict[Any, int], values: list[Any]) -> None:
    rank = open_pipes[pipe]
    try:
        if pipe.poll():
            values[rank] = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):  # it ended, perhaps in mid-sentence
        del open_pipes[pipe]


def _forward(pids: list[int | None]) -> None:
    def send(signum: int, frame: Any) -> None:
        for pid in pids:
            if pid is not None and _is_ours(pid):
                os.kill(pid, signum)

    signal.signal(signal.SIGTERM, send)
    signal.signal(signal.SIGINT, send)


def _is_ours(pid: int) -> bool:
    return any(p.pid == pid for p in multiprocessing.active_children())


def _main(pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    code = 0
    try:
        # Plain pickle: torch's own way shares memory with this process, which is about to end.
        pipe.send_bytes(pickle.dumps(function(*args)))
    except UserError as error:
        pipe.send_bytes(pickle.dumps(error))
        code = EXIT_USER
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else EXIT_FAULT
    except BaseException:
        traceback.print_exc()
        code = EXIT_FAULT
    end(code)
