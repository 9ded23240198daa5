"""A job's batch step: it starts the run's processes on the job's nodes, again and again until the run is done.

    USR1 (the time limit is near), TERM      the stop file: the running step ends, all ranks save and leave with 75
    0          done
    2          the input is wrong: no other attempt would do better
    75         saved: the job is requeued, or followed by another where it cannot be; after `lamella stop` it ends
    else       a process or node has failed: started again here, at most `cluster.attempts` times without a step more

A node that is lost takes the whole job with it, and Slurm itself requeues that. Every attempt adds its beginning and
its end to `attempts.jsonl` in the run's folder.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lamella.checkpoint import series
from lamella.config import RunConfig
from lamella.errors import EXIT_FAULT, EXIT_REQUEUE, EXIT_USER, UserError
from lamella.parallel.seat import first_host, step_port
from lamella.train import stop_file
from lamella.train.say import say

ATTEMPTS = "attempts.jsonl"
WAIT = 60  # seconds that the other tasks of a step have once the first has ended
AGAIN = 2.0  # seconds between two looks at what is asked of the job


class Job:
    """`run_file` with `overrides` is `run`, as this process was given it."""

    def __init__(self, run: RunConfig, words: list[str], environ: Mapping[str, str] = os.environ):
        self.run, self.words, self.environ = run, words, environ
        if "SLURM_JOB_ID" not in environ:
            raise UserError("no Slurm job here: submit with lamella submit or sbatch, or use launch/torchrun.sh")
        self.job, self.nodes = environ["SLURM_JOB_ID"], int(environ.get("SLURM_JOB_NUM_NODES", "1"))
        self.per_node = int(environ.get("SLURM_NTASKS_PER_NODE", "1"))
        self.asked: list[int] = []

    def supervise(self) -> int:
        """The batch step's exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.asked.append(number))
        self.run.folder.mkdir(parents=True, exist_ok=True)
        fruitless, before = 0, self.saved()
        for attempt in range(sys.maxsize):
            code = self._attempt(attempt)
            if code in (0, EXIT_USER):
                return code
            if code == EXIT_REQUEUE or self.asked:
                return self._leave()
            now = self.saved()
            fruitless = 0 if now > before else fruitless + 1
            before = now
            if fruitless >= self.run.cluster.attempts:
                say(f"{self.run.name}: {fruitless} attempts in a row got no further than step {now}; the job ends")
                return EXIT_FAULT
        return EXIT_FAULT

    def saved(self) -> int:
        """The newest checkpoint's step."""
        found = series.steps(self.run.folder / "checkpoints")
        return found[-1] if found else 0

    def command(self, attempt: int) -> list[str]:
        """What starts all of the run's processes."""
        train = ["-m", "lamella", "train", *self.words]
        srun = ["srun", "--kill-on-bad-exit=0", f"--wait={WAIT}"]
        if image := self.environ.get("LAMELLA_CONTAINER"):
            srun.append(f"--container-image={image}")  # enroot and pyxis
        if self.run.cluster.launcher == "srun":
            return [*srun, f"--ntasks={self.nodes * self.per_node}", sys.executable, *train]
        restart = int(self.environ.get("SLURM_RESTART_COUNT", "0"))
        host = first_host(self.environ["SLURM_JOB_NODELIST"])
        port = step_port(int(self.job), 1000 * restart + attempt)
        return [
            *srun, f"--ntasks={self.nodes}", "--ntasks-per-node=1",
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.nodes}",
            f"--nproc-per-node={self.per_node}", "--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}",
            f"--rdzv-id={self.job}.{restart}.{attempt}", *train,
        ]  # fmt: skip

    def _attempt(self, attempt: int) -> int:
        stop_file.clear(self.run.folder)
        self.note("began", attempt=attempt)
        process = subprocess.Popen(self.command(attempt))
        while (code := _wait(process, AGAIN)) is None:
            if self.asked and stop_file.requested(self.run.folder) is None:
                stop_file.request(self.run.folder, "requeue")  # and again, where the run has just begun and cleared it
        why = stop_file.requested(self.run.folder)
        if code not in (0, EXIT_USER) and why is not None:
            code = EXIT_REQUEUE  # torchrun has its own code for a rank's 75
        self.note("ended", attempt=attempt, code=code, why=why, step=self.saved())
        return code

    def _leave(self) -> int:
        """After a save: this job again, another one, or none."""
        if stop_file.requested(self.run.folder) == "stop":
            say(f"{self.run.name}: stopped at step {self.saved()}, as asked")
            return 0
        if signal.SIGTERM in self.asked and signal.SIGUSR1 not in self.asked:
            return EXIT_REQUEUE  # preempted: Slurm requeues; or cancelled: nobody does
        if requeue(self.job):
            self.note("requeued")
            time.sleep(3600)  # until Slurm ends it
        return self._follow()

    def _follow(self) -> int:
        script = self.run.folder / "submit" / "job.sh"
        if not script.exists() or shutil.which("sbatch") is None:
            say(f"{self.run.name}: saved at step {self.saved()}, but this job cannot be requeued; submit it again")
            return EXIT_REQUEUE
        done = subprocess.run(["sbatch", "--parsable", f"--dependency=afterany:{self.job}", str(script)], text=True,
                              stdout=subprocess.PIPE)  # fmt: skip
        self.note("followed", by=done.stdout.strip(), code=done.returncode)
        return 0 if done.returncode == 0 else EXIT_REQUEUE

    def note(self, event: str, **values: Any) -> None:
        restart = int(self.environ.get("SLURM_RESTART_COUNT", "0"))
        line = {"time": time.time(), "event": event, "job": self.job, "restart": restart}
        line |= {"nodes": self.environ.get("SLURM_JOB_NODELIST", socket.gethostname())} | values
        with (self.run.folder / ATTEMPTS).open("a") as file:
            file.write(json.dumps(line) + "\n")


def requeue(job: str, call: Callable[..., Any] = subprocess.run) -> bool:
    """Whether Slurm took it. In a container there may be no scontrol, and a site may forbid requeueing."""
    try:
        return call(["scontrol", "requeue", job]).returncode == 0
    except OSError:
        return False


def attempts(folder: Path) -> list[dict[str, Any]]:
    """What the jobs of a run have noted, oldest first; a line that a crash has cut off is left out."""
    try:
        lines = (folder / ATTEMPTS).read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Its exit code; None after so long. A signal's is 128 and more, as a shell has it."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    return code if code >= 0 else 128 - code
