"""A run's folder: made, or found to be another thing, before any process starts."""

import os
import tempfile
from pathlib import Path

from lamella.config import RunConfig
from lamella.errors import UserError


def open_folder(run: RunConfig) -> Path:
    """Makes `runs/NAME` with room for checkpoints, and tries a write. Raises UserError where the disk refuses."""
    folder = run.folder
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        taken = next(p for p in (folder / "checkpoints", folder, *folder.parents) if p.exists())
        raise UserError(f"{taken} is a file where the run's folder should be; move it, or set name= or runs=") from None
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UserError(f"{folder}: cannot be written ({why}); set runs= to another place") from None
    return folder
