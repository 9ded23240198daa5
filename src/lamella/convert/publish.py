"""A folder that is there whole or not at all, and what is said of it."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lamella.checkpoint import manifest
from lamella.config import ModelConfig
from lamella.errors import UserError


@dataclasses.dataclass(frozen=True)
class Done:
    """`what` the other side is, the `dtype` of most of its weights; `checkpoint` is ours."""

    target: Path
    what: str
    dtype: torch.dtype
    checkpoint: Path
    model: ModelConfig
    notes: tuple[str, ...]


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name when all is written, and goes when something fails."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: is there already; name a new folder")
    folder = target.with_name(target.name + ".tmp")
    try:
        if folder.exists():  # of a conversion that was killed
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        yield folder
        for path in (*folder.rglob("*"), folder):
            manifest.sync(path)
        folder.rename(target)
        manifest.sync(target.parent)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
