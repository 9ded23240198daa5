"""What each store was sent of a run: `tracking.json` in the run's folder."""

import contextlib
import dataclasses
import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

from lamella.config import RunConfig


@dataclasses.dataclass
class Note:
    """What one store was sent of a run. `key` is a tag of its MLflow run, noted before the run is made."""

    uri: str
    experiment: str
    name: str
    identity: str
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    next: int = 0
    status: str | None = None
    files: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, config: RunConfig, uri: str, start: int | None = None) -> "Note":
        """The note of this run in this store, or a new one.

        Another name means a copied folder, another configuration at step 0 a run begun anew: neither goes on in the
        old MLflow run.
        """
        new = cls(uri, config.tracking.experiment, config.name, _identity(config))
        with contextlib.suppress(KeyError, TypeError):
            old = cls(**_notes(folder)[uri])
            same = (old.experiment, old.name) == (new.experiment, new.name)
            if same and (start != 0 or old.identity == new.identity):
                old.identity = new.identity
                return old
        return new

    def save(self, folder: Path) -> None:
        """Writes it beside the notes of other stores, whole or not at all."""
        temporary = folder / "tracking.tmp"
        temporary.write_text(json.dumps(_notes(folder) | {self.uri: dataclasses.asdict(self)}, indent=1) + "\n")
        temporary.replace(folder / "tracking.json")


def _notes(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "tracking.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _identity(config: RunConfig) -> str:
    return hashlib.sha256(config.model_dump_json(exclude={"tracking", "runs"}).encode()).hexdigest()[:16]
