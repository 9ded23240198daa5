"""`lamella submit`, `status`, `watch`, `stop`, and `job`, which a submitted job runs."""

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.train import Overrides
from lamella.errors import UserError

if TYPE_CHECKING:
    from lamella.config import RunConfig

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml")]
FIELDS = "%i %T %D %M %l %R"  # of squeue: number, state, nodes, time, limit, nodes or reason


def submit(
    run: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="and processes; 0: --tasks-per-node, on CPUs")] = 0,
    tasks_per_node: Annotated[int, typer.Option(min=1, help="processes, where there are no GPUs")] = 1,
    partition: Annotated[str | None, typer.Option(help="the site's default where left out")] = None,
    limit: Annotated[str | None, typer.Option("--time", metavar="D-HH:MM:SS")] = None,
    chain: Annotated[int, typer.Option(min=1, help="so many jobs, one after the other")] = 1,
    container: Annotated[str | None, typer.Option(metavar="IMAGE", help="as the site's srun --container-image")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the script, ask Slurm, submit nothing")] = False,
) -> None:
    """Validate a run and its layout, take a snapshot of configuration, code and packages, and submit it to Slurm."""
    from lamella.cluster import submit as cluster
    from lamella.config import load_run

    config = load_run(run, overrides or [])
    wanted = cluster.Wanted(nodes, gpus_per_node, tasks_per_node, partition, limit, chain, container)
    wanted.check()
    from lamella.convert.origin import opened
    from lamella.train import check

    print(check.describe(config, check.check(config, wanted.nodes * wanted.per_node, opened)), flush=True)
    script = cluster.snapshot(config, wanted)
    if dry_run:
        print(script.read_text())
        print(cluster.test_only(config, wanted, script))
        return
    numbers = cluster.submit(config, wanted, script)
    print(f"job {', then '.join(numbers)}: {config.folder}; lamella watch {script.parent / 'config.yaml'}")


def status(run: RunFile, overrides: Overrides = None) -> None:
    """Show a run's jobs, its attempts and its last step."""
    config = _load(run, overrides)
    for line in _queue(config):
        print(line)
    from lamella.cluster.job import attempts

    for line in attempts(config.folder)[-10:]:
        rest = {k: v for k, v in line.items() if k not in ("time", "event")}
        print(time.strftime("%F %T", time.localtime(line["time"])), line["event"],
              " ".join(f"{k}={v}" for k, v in rest.items()))  # fmt: skip
    last = _last_step(config)
    print(f"{config.name}: " + (f"step {last['step'] + 1} of {config.train.steps}, loss {last['loss']:.4f}"
                                if last else "no step yet"))  # fmt: skip


def watch(run: RunFile, overrides: Overrides = None) -> None:
    """Follow the log of a run's newest job until no job of it is left."""
    config = _load(run, overrides)
    seen: dict[Path, int] = {}
    while True:
        alive = bool(_queue(config))
        for log in sorted(config.folder.glob("slurm-*.log")):
            with log.open(errors="replace") as file:
                file.seek(seen.get(log, 0))
                print(file.read(), end="", flush=True)
                seen[log] = file.tell()
        if not alive:
            return
        time.sleep(2)


def stop(
    run: RunFile,
    overrides: Overrides = None,
    now: Annotated[bool, typer.Option("--now", help="cancel its jobs, without a save")] = False,
) -> None:
    """End a run's jobs: the running step is saved; what waits in the queue is cancelled. `submit` continues it."""
    config = _load(run, overrides)
    from lamella.train import stop_file

    jobs = [line.split() for line in _queue(config)]
    stop_file.request(config.folder, "stop")
    gone = [job for job, state, *_ in jobs if now or state != "RUNNING"]
    if gone:
        subprocess.run(["scancel", *gone], check=False)
    left = [job for job, *_ in jobs if job not in gone]
    print(f"{config.name}: " + (f"job {', '.join(left)} saves and ends" if left else "no job is running"))


def job(run: RunFile, overrides: Overrides = None) -> None:
    """Inside a Slurm job: start the run on its nodes, and again after a failure, until it is done. See slurm/."""
    from lamella.cluster.job import Job
    from lamella.config import load_run

    words = [str(run), *(overrides or [])]
    raise typer.Exit(Job(load_run(run, overrides or []), words).supervise())


def _load(run: Path, overrides: list[str] | None) -> "RunConfig":
    from lamella.config import load_run

    config = load_run(run, overrides or [])
    if not config.folder.is_dir():
        raise UserError(f"{config.folder}: no such run yet; lamella submit or lamella train begins it")
    return config


def _queue(config: "RunConfig") -> list[str]:
    """The run's jobs that Slurm still knows as waiting or running."""
    from lamella.cluster.submit import RECORD

    try:
        numbers = (config.folder / RECORD).read_text().split()
    except OSError:
        return []
    if not numbers:
        return []
    try:
        words = ["squeue", "--noheader", f"--format={FIELDS}", f"--jobs={','.join(numbers)}"]
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("no squeue here: ask on a cluster's login node") from None
    lines = [line.strip() for line in done.stdout.splitlines()]
    return [line for line in lines if line.split()[1] not in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT")]


def _last_step(config: "RunConfig") -> dict | None:
    from lamella.train.metrics_file import read_metrics

    file = config.folder / "metrics.jsonl"
    lines = read_metrics(file) if file.exists() else []
    return lines[-1] if lines else None
