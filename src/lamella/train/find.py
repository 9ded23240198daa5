"""Which checkpoint a user means. Names are looked at before torch is imported: a mistyped folder is told at once."""

import difflib
from pathlib import Path

from lamella.errors import UserError

ANOTHER = "name a run's folder or one of its checkpoints"


def find_checkpoint(where: Path) -> Path:
    """The checkpoint at `where`: itself, or the newest one of a run's folder or of its `checkpoints`.

    Raises UserError where there is none.
    """
    if not where.exists():
        near = difflib.get_close_matches(where.name, _names(where.parent), 1)
        raise UserError(f"{where}: no such folder; " + (f"did you mean {where.parent / near[0]}?" if near else ANOTHER))
    if not where.is_dir():
        raise UserError(f"{where}: a file, not a checkpoint's folder; {ANOTHER}")
    if where.name.startswith("step-"):
        if where.suffix == ".tmp":
            raise UserError(f"{where}: an unfinished save; {ANOTHER}")
        return where
    folder = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    if not any(name.startswith("step-") for name in _names(folder)):
        raise UserError(f"{where}: no checkpoint there; {ANOTHER}")
    from lamella.checkpoint import series

    newest = series.latest(folder)
    if newest is None:
        raise UserError(f"{where}: no finished checkpoint there yet; {ANOTHER}")
    return newest


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
