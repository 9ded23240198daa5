"""A run's place in MLflow: found or made there, and told what it has not got yet.

MLflow keeps a step that is logged twice as two points. So of every metric it is asked for the last step it has, each
time a connection is made, and only later steps are sent. What it took is noted in the run's folder, in
`tracking.json`, one note for each store that the run was ever sent to.

mlflow is imported when a connection is made, and this process' logging falls silent then: it is the tracker's own.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import re
import socket
import subprocess
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.config import RunConfig
from lamella.errors import UserError
from lamella.train.note import Note

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

LONGEST_KEY, LONGEST_VALUE = 250, 6000  # characters that MLflow takes
MOST_METRICS, MOST_PARAMETERS = 1000, 100  # in a request
# The tracker itself tries again, and asks first what has arrived; a request that hangs must not take the whole flush.
REQUESTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "8", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
SILENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


class NoMlflow(Exception):
    """mlflow cannot be imported."""


class Store:
    """A run in one MLflow store. Whatever MLflow raises comes through; `connect` is called again after it."""

    def __init__(self, folder: Path, config: RunConfig, uri: str | None = None, start: int | None = None):
        self.folder, self.config = folder, config
        self.uri = find_uri(folder, uri or config.tracking.uri)
        self.note = Note.load(folder, config, self.uri, start)
        self.client: MlflowClient | None = None
        self.have: dict[str, int] = {}  # the last step of each metric there

    def connect(self, begun: int, running: bool) -> bool:
        """Finds or makes the MLflow run (begun at `begun`, milliseconds). Returns whether it has less than noted.

        `running`: it is being trained, from this working directory.
        """
        client = _client(self.uri, self._init_lock)
        run = self._find(client) or self._make(client, begun)
        self.have = {m.key: int(m.step) for m in run.data.to_proto().metrics}
        self._describe(client, run, running)
        self.client = client
        there = self.have.get("loss", -1) + 1
        lost, self.note.next = there < self.note.next, there
        self.note.status = "RUNNING" if running else self.note.status
        self.note.save(self.folder)
        return lost

    def disconnect(self) -> None:
        self.client = None

    def send(self, lines: list[tuple[dict[str, Any], int]]) -> None:
        """Sends lines of metrics, each with its time in milliseconds, without the steps that are there."""
        from mlflow.entities import Metric

        assert self.client is not None and self.note.run_id is not None
        points = [
            Metric(name, value, moment, line["step"])
            for line, moment in lines
            for name, value in scalars(line)
            if line["step"] > self.have.get(name, -1)
        ]
        for first in range(0, len(points), MOST_METRICS):
            some = points[first : first + MOST_METRICS]
            self.client.log_batch(self.note.run_id, metrics=some, synchronous=True)
            self.have.update((m.key, m.step) for m in some)
        after = max(line["step"] for line, _ in lines) + 1
        if after > self.note.next:
            self.note.next = after
            self.note.save(self.folder)

    def send_files(self) -> None:
        """Sends the configuration and the figures that are new or have changed."""
        assert self.client is not None and self.note.run_id is not None
        for file in [self.folder / "config.yaml", *sorted((self.folder / "figures").rglob("*"))]:
            with contextlib.suppress(FileNotFoundError):  # of a figure that is being replaced
                name, found = file.relative_to(self.folder), file.stat()
                stamp = [found.st_mtime_ns, found.st_size]
                if not file.is_file() or self.note.files.get(str(name)) == stamp:
                    continue
                where = None if name.parent == Path() else str(name.parent)
                self.client.log_artifact(self.note.run_id, str(file), where)
                self.note.files[str(name)] = stamp
                self.note.save(self.folder)

    def end(self, status: str, moment: int) -> None:
        """Marks the MLflow run FINISHED, KILLED or FAILED, as of a time in milliseconds."""
        assert self.client is not None and self.note.run_id is not None
        self.client.set_terminated(self.note.run_id, status, moment)
        self.note.status = status
        self.note.save(self.folder)

    @contextlib.contextmanager
    def _init_lock(self) -> Iterator[None]:
        """One process at a time where a database may have to be made: two that migrate it together both fail."""
        if self.uri.startswith("http"):
            yield
            return
        with (_home(self.uri, self.folder) / "mlflow.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _find(self, client: "MlflowClient") -> "Run | None":
        """The run that was made before, by its note; by its tag where the note was not written any more."""
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self.config.tracking.experiment)
        if experiment is None:
            return None
        if self.note.run_id is not None:
            try:
                run = client.get_run(self.note.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
            # Deleted there: it is sent again, as a new run.
            self.note = dataclasses.replace(self.note, key=uuid.uuid4().hex, run_id=None, files={})
        found = client.search_runs([experiment.experiment_id], f"tags.`lamella.key` = '{self.note.key}'", max_results=1)
        if found:
            self.note.run_id = found[0].info.run_id
        return found[0] if found else None

    def _make(self, client: "MlflowClient", begun: int) -> "Run":
        self.note.save(self.folder)
        with self._init_lock():
            experiment = client.get_experiment_by_name(self.config.tracking.experiment) or self._experiment(client)
        tags = {"lamella.key": self.note.key}
        run = client.create_run(experiment.experiment_id, begun, tags, self.config.name)
        self.note.run_id, self.note.files = run.info.run_id, {}
        return run

    def _experiment(self, client: "MlflowClient") -> "Experiment":
        from mlflow.exceptions import MlflowException

        # A database holds no files, and MLflow's own choice for them hangs on the working directory.
        files = None if self.uri.startswith("http") else (_home(self.uri, self.folder) / "mlartifacts").as_uri()
        try:
            made = client.create_experiment(self.config.tracking.experiment, files)
        except MlflowException as error:
            found = client.get_experiment_by_name(self.config.tracking.experiment)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            return found
        return client.get_experiment(made)

    def _describe(self, client: "MlflowClient", run: "Run", running: bool) -> None:
        """Parameters and tags. A parameter is never changed in MLflow: its new value is a tag, `now.NAME`."""
        from mlflow.entities import Param, RunTag

        wanted, there = parameters(self.config), run.data.params
        new = [Param(k, v) for k, v in wanted.items() if k not in there]
        for first in range(0, len(new), MOST_PARAMETERS):
            client.log_batch(run.info.run_id, params=new[first : first + MOST_PARAMETERS], synchronous=True)
        tags = {f"now.{k}"[:LONGEST_KEY]: v for k, v in wanted.items() if there.get(k, v) != v}
        tags |= {"lamella.version": importlib.metadata.version("lamella"), "lamella.folder": str(self.folder)}
        if running:
            tags |= {"lamella.host": socket.gethostname()} | _commit()
            client.update_run(run.info.run_id, status="RUNNING")
        tags = {k: v for k, v in tags.items() if run.data.tags.get(k) != v}
        if tags:
            client.log_batch(run.info.run_id, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)


def find_uri(folder: Path, uri: str | None) -> str:
    """The store's URI, a database file by its absolute path; by default `mlflow.db` beside the run's folder.

    Raises UserError where it is no URI.
    """
    if uri is None:
        return f"sqlite:///{folder.absolute().parent / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if not re.match(r"(https?|postgresql|mysql|mssql)(\+\w+)?://.", uri):
        raise UserError(f"{uri}: no store of MLflow; tracking.uri reads http://HOST:PORT or sqlite:///FILE")
    return uri


def scalars(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """A line's numbers by name, nested ones as moe/LAYER/entropy; of a list, as an expert's loads, the ends."""
    for key, value in tree.items():
        name = prefix + re.sub(r"[^\w.\- /:]", "_", key)
        if isinstance(value, dict):
            yield from scalars(value, name + "/")
        elif isinstance(value, list):
            numbers = [float(x) for x in value if isinstance(x, int | float)]
            if numbers:
                yield from ((f"{name}_max", max(numbers)), (f"{name}_min", min(numbers)))
        elif isinstance(value, int | float) and name != "step":
            yield name[:LONGEST_KEY], float(value)


def parameters(config: RunConfig) -> dict[str, str]:
    """The resolved configuration, flat: train.optimizer.lr, model.stack.0.layers."""
    found: dict[str, str] = {}

    def walk(tree: Any, name: str) -> None:
        if isinstance(tree, list) and any(isinstance(x, dict) for x in tree):
            tree = dict(enumerate(tree))
        if isinstance(tree, dict):
            for key, value in tree.items():
                walk(value, f"{name}.{key}" if name else str(key))
        else:
            text = tree if isinstance(tree, str) else json.dumps(tree)
            found[re.sub(r"[^\w.\- /:]", "_", name)[:LONGEST_KEY]] = text[:LONGEST_VALUE]

    walk(config.model_dump(mode="json"), "")
    return found


def _client(uri: str, lock: Any) -> "MlflowClient":
    os.environ.update(SILENT)
    for key, value in REQUESTS.items():
        os.environ.setdefault(key, value)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        from mlflow import MlflowClient
    except Exception as error:  # whatever a broken installation raises
        raise NoMlflow(" ".join(str(error).split())[:200]) from error
    with lock():
        return MlflowClient(tracking_uri=uri)


def _home(uri: str, folder: Path) -> Path:
    """Where a database's lock and files lie: beside its file, else beside the run."""
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else folder.absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.parent


def _commit() -> dict[str, str]:
    """The git commit of the working directory, under the name by which MLflow shows it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        return {"mlflow.source.git.commit": done.stdout.strip(), "mlflow.source.name": "lamella"}
    return {}


def now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(1000 * time.time())
