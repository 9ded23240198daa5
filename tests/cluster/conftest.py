"""A real Slurm cluster of four nodes on this machine, and the run that the jobs train, once without a cluster."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamella.config import change, dump, load_run
from tests.commands import call
from tests.corpus import prepare_corpus, tiny_run

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
STEPS = 120


class Cluster:
    """Nodes n1 to n4. `call(COMMAND, ...)` runs the cluster's own script."""

    def __init__(self, folder: Path):
        self.environ = os.environ | {"SLURM_TEST_DIR": str(folder)}

    def call(self, *words: str) -> str:
        done = subprocess.run(["bash", SCRIPT, *words], env=self.environ, capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{words}: no answer")
        return done.stdout

    def slurm(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def state(self, job: str) -> str:
        words = self.slurm("scontrol", "show", "job", job)
        return next(word for word in words.split() if word.startswith("JobState=")).removeprefix("JobState=")

    def ranks(self, job: str) -> list[int]:
        """Pids of the job's training processes, by rank."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environ = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            told = dict(word.split("=", 1) for word in environ if "=" in word)
            if told.get("SLURM_JOB_ID") == job and "train" in words and "torch.distributed.run" not in words:
                rank = told.get("RANK") or told.get("SLURM_PROCID")
                if rank is not None and "srun" not in words[0]:
                    found[int(rank)] = int(entry.name)
        return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a test cluster needs Linux and root")
    folder = Path("/tmp") / f"lamella-slurm-{os.getpid()}"
    made = Cluster(folder)
    try:
        conf = made.call("up", "4").strip().removeprefix("export SLURM_CONF=")
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no Slurm here: {error}")
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "OMP_NUM_THREADS", "PATH")}
    binaries = str(Path(sys.executable).parent)
    os.environ |= {"SLURM_CONF": conf, "OMP_NUM_THREADS": "1", "PATH": f"{binaries}:{os.environ['PATH']}"}
    yield made
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    made.call("down")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A run's file over a prepared corpus; and the run `alone`, trained by four processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("cluster")
    config = tiny_run(prepare_corpus(folder), folder / "runs", name="alone")
    train = config.train.model_dump(mode="json") | {"steps": STEPS}
    train |= {"checkpoint": {"every": 10, "keep": 2}, "evaluate": {"every": 60, "rows": 4}}
    config = change(config, train=train, cluster={"stop_before": 20})
    dump(config, folder / "run.yaml")
    assert call("train", folder / "run.yaml", "--nproc", 4) == 0
    return folder


class Submitted:
    """A run in the cluster's queue on two nodes of two processes each."""

    def __init__(self, cluster: Cluster, home: Path, name: str, *words: str):
        self.cluster, self.home, self.name, self.words = cluster, home, name, words
        self.config = load_run(home / "run.yaml", [f"name={name}", *words])
        self.folder = self.config.folder
        self.submit()

    def submit(self, *options: str) -> None:
        nodes = ("--nodes", "2", "--tasks-per-node", "2")
        assert call("submit", self.home / "run.yaml", f"name={self.name}", *self.words, *nodes, *options) == 0
        self.job = (self.folder / "jobs.txt").read_text().split()[-1]

    def steps(self) -> list[dict]:
        try:
            return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            return []

    def reach(self, step: int, seconds: float = 120) -> None:
        self.until(lambda: len(self.steps()) > step, f"reach step {step}", seconds)

    def finish(self, seconds: float = 240) -> None:
        done = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.cluster.state(self.job) in done, "end", seconds)

    def until(self, true, what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                log = "".join(path.read_text()[-3000:] for path in self.folder.glob("slurm-*.log"))
                raise AssertionError(f"{self.name} does not {what}: {self.cluster.state(self.job)}\n{log}")
            time.sleep(0.2)

    def assert_as_if_nothing_had_happened(self) -> None:
        """Every step once, its loss that of the run alone bit for bit; the last checkpoints are equal."""
        assert self.cluster.state(self.job) == "COMPLETED"
        wanted = [json.loads(line) for line in (self.home / "runs/alone/metrics.jsonl").read_text().splitlines()]
        told = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines] for lines in (self.steps(), wanted)]
        assert told[0] == told[1]
        last = f"checkpoints/step-{STEPS:08d}"
        assert call("checkpoint", "diff", self.folder / last, self.home / "runs/alone" / last) == 0


@pytest.fixture
def submit(cluster, home, request):
    """Submits a run, named after the test; what is left of it is cancelled."""
    made: list[Submitted] = []

    def start(*words: str, name: str = "") -> Submitted:
        safe = "".join(c if c.isalnum() else "-" for c in request.node.name) + name
        made.append(Submitted(cluster, home, safe, *words))
        return made[-1]

    yield start
    for one in made:
        for job in (one.folder / "jobs.txt").read_text().split():
            subprocess.run(["scancel", "--full", job], capture_output=True)
