"""From a run's file to a job in Slurm's queue.

What the job runs is a snapshot in `runs/NAME/submit/`: the resolved configuration, the code's commit and what differs
from it, the installed packages, and `job.sh`, which is `slurm/pretrain.sbatch` with the snapshot's path behind it. No
environment variable is written there, they may be secret; the job gets the submitter's as sbatch hands them on.
"""

import dataclasses
import importlib.metadata
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from lamella.config import RunConfig, dump
from lamella.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "slurm" / "pretrain.sbatch"
RECORD = "jobs.txt"  # in the run's folder: the numbers of its jobs, one a line
LARGEST_DIFF = 10_000_000  # bytes
_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,-]*")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked of Slurm. `gpus_per_node` is also how many processes a node has; 0: `tasks_per_node`, on CPUs."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    partition: str | None
    time: str | None
    chain: int = 1
    container: str | None = None

    @property
    def per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node

    def check(self) -> None:
        """Raises UserError for what could not be meant."""
        if self.partition is not None and not _WORD.fullmatch(self.partition):
            raise UserError(f"--partition {self.partition!r} is not the name of a partition; see sinfo")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UserError(f"--time {self.time!r} is not like 30, 12:00:00 or 2-00:00:00")


def sbatch_words(run: RunConfig, wanted: Wanted) -> list[str]:
    """The options of sbatch, each a word of its own: no shell sees them."""
    log = str(run.folder.absolute() / "slurm-%j.log").replace("%", "%%").replace("slurm-%%j", "slurm-%j")
    words = [f"--job-name={run.name}", f"--nodes={wanted.nodes}", f"--ntasks-per-node={wanted.per_node}"]
    words += [f"--output={log}", f"--signal=B:USR1@{run.cluster.stop_before}", f"--chdir={Path.cwd()}"]
    words += [f"--gpus-per-node={wanted.gpus_per_node}"] if wanted.gpus_per_node else []
    words += [f"--partition={wanted.partition}"] if wanted.partition is not None else []
    words += [f"--time={wanted.time}"] if wanted.time is not None else []
    return words


def snapshot(run: RunConfig, wanted: Wanted) -> Path:
    """Writes the folder, anew where it was there. Returns the script."""
    folder = run.folder.absolute() / "submit"
    fresh = folder.with_name("submit.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    dump(run, fresh / "config.yaml")
    (fresh / "code.txt").write_text(_code())
    packages = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    (fresh / "packages.txt").write_text("\n".join(packages) + "\n")
    (fresh / "job.sh").write_text(script(run, wanted, folder / "config.yaml"))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder / "job.sh"


def script(run: RunConfig, wanted: Wanted, config: Path) -> str:
    """`slurm/pretrain.sbatch` with its options and its run filled in."""
    try:
        text = TEMPLATE.read_text()
    except OSError:
        raise UserError(f"{TEMPLATE} is not there: install lamella from a checkout (launch/install.sh)") from None
    head, body = text.split("set -euo pipefail\n", 1)
    shebang, *about = [line for line in head.splitlines() if not line.startswith("#SBATCH")]
    fixed = ["#SBATCH --open-mode=append", "#SBATCH --requeue"]
    words = [shlex.quote(str(ROOT)), shlex.quote(str(config))]
    container = f"export LAMELLA_CONTAINER={shlex.quote(wanted.container)}\n" if wanted.container else ""
    return "\n".join([shebang, *about, *fixed, "set -euo pipefail", f"set -- {' '.join(words[1:])}",
                      f"export LAMELLA_HOME={words[0]}", container + body])  # fmt: skip


def submit(run: RunConfig, wanted: Wanted, script_file: Path) -> list[str]:
    """The numbers of the jobs, each of a chain after the one before it. Raises UserError where Slurm refuses."""
    numbers: list[str] = []
    for _ in range(wanted.chain):
        after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        numbers.append(_sbatch(["--parsable", *sbatch_words(run, wanted), *after, str(script_file)]).split(";")[0])
        with (run.folder / RECORD).open("a") as file:
            file.write(numbers[-1] + "\n")
    return numbers


def test_only(run: RunConfig, wanted: Wanted, script_file: Path) -> str:
    """What Slurm says of the job without taking it."""
    return _sbatch(["--test-only", *sbatch_words(run, wanted), str(script_file)])


def _sbatch(words: list[str]) -> str:
    try:
        done = subprocess.run(["sbatch", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("no sbatch here: submit from a cluster's login node, or use launch/torchrun.sh") from None
    said = (done.stdout.strip() or done.stderr.strip()) if done.returncode == 0 else " ".join(done.stderr.split())
    if done.returncode:
        raise UserError(f"sbatch refuses: {said}")
    return said


def _code() -> str:
    """The commit, and what differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout

    try:
        commit, diff = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except FileNotFoundError:
        commit, diff = "", ""
    version = importlib.metadata.version("lamella")
    return f"lamella {version}, commit {commit or 'unknown'}\n\n{diff[:LARGEST_DIFF]}"
