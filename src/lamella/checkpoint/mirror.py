"""A second place for checkpoints, anything that fsspec opens: `s3://bucket/run`, `gs://...`, `file:///mnt/other`.

Whole published checkpoints are copied there. Object stores rename nothing, so `manifest.json` is written last and
deleted first: where it is missing there is no checkpoint.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamella.checkpoint import manifest
from lamella.checkpoint.files import unpublished
from lamella.errors import UserError

CURE = "mend it, or leave out train.checkpoint.mirror"


class Mirror:
    """At a URL. For one process. Every method raises UserError where the place does not answer."""

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        self.url = url
        with self._errors("no such place"):
            self.fs: Any
            self.fs, self.root = url_to_fs(url)

    def steps(self) -> list[int]:
        with self._errors("cannot be read"):
            self.fs.invalidate_cache()
            found = self.fs.ls(self.root, detail=False) if self.fs.exists(self.root) else []
            names = [name.rstrip("/").rsplit("/", 1)[-1] for name in found]
            numbers = [n.removeprefix("step-") for n in names if n.startswith("step-")]
            return sorted(int(n) for n in numbers if n.isdigit() and self._has(f"step-{n}"))

    def push(self, path: Path) -> None:
        """Copies a published checkpoint, unless it is there."""
        with self._errors("cannot be written"):
            if self._has(path.name):
                return
            self.fs.makedirs(f"{self.root}/{path.name}", exist_ok=True)
            for name in [*manifest.read(path), manifest.NAME]:
                self.fs.put_file(str(path / name), f"{self.root}/{path.name}/{name}")

    def fetch(self, step: int, path: Path) -> None:
        """Copies the checkpoint of a step to `path`; its digests are not compared here."""
        folder = unpublished(path)
        with self._errors("cannot be read"):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            there = f"{self.root}/{path.name}"
            for name in self.fs.ls(there, detail=False):
                self.fs.get_file(name, str(folder / name.rsplit("/", 1)[-1]))
            folder.rename(path)

    def drop(self, step_folder: str) -> None:
        """Deletes a checkpoint by its folder's name, where it is."""
        with self._errors("cannot be written"):
            there = f"{self.root}/{step_folder}"
            if self.fs.exists(there):
                if self._has(step_folder):
                    self.fs.rm_file(f"{there}/{manifest.NAME}")
                self.fs.rm(there, recursive=True)

    def _has(self, name: str) -> bool:
        return self.fs.exists(f"{self.root}/{name}/{manifest.NAME}")

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """A file system of fsspec raises whatever its library does."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            why = " ".join(str(error).split())[:150] or type(error).__name__
            raise UserError(f"train.checkpoint.mirror={self.url}: {what} ({why}); {CURE}") from error
