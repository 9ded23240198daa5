"""The hidden folder beside the target in which a preparing lies until it is whole.

    .NAME.preparing/  lock  journal.json  seen  lengths/  out/ (what becomes the target)  old/ (what is being replaced)

It outlives a kill; its lock does not.
"""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from lamella.data.prepare import journal
from lamella.data.store.manifest import MANIFEST
from lamella.errors import UserError


class Work:
    """`with Work(folder) as work`: nobody else prepares that folder meanwhile."""

    def __init__(self, folder: Path):
        self.target = folder
        self.folder = folder.with_name(f".{folder.name}.preparing")
        self.out, self._old = self.folder / "out", self.folder / "old"

    def __enter__(self) -> "Work":
        """Raises UserError when another process holds it, OSError when the place cannot be written."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the one before has just removed it
                continue
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.read(self._lock, 100).decode(errors="replace").strip()
                os.close(self._lock)
                raise UserError(
                    f"{self.target}: being prepared by another process ({who}); wait for it, or choose another path"
                ) from None
            if _same(self._lock, self.folder / "lock"):
                break
            os.close(self._lock)
        os.truncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()} on {os.uname().nodename}".encode())
        if self._old.exists() and not self.target.exists():  # killed between the two renamings
            self._old.rename(self.target)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def clear(self) -> None:
        """Away with everything but the lock."""
        for thing in self.folder.iterdir():
            if thing.name != "lock":
                shutil.rmtree(thing) if thing.is_dir() else thing.unlink()
        self.out.mkdir()

    def publish(self) -> None:
        """Gives what is in `out` the target's name, in place of an older folder or an empty one."""
        for thing in self.out.rglob("*"):
            if not thing.is_symlink():
                journal.sync(thing)
        journal.sync(self.out)
        if (self.target / MANIFEST).exists():
            if self._old.exists():
                shutil.rmtree(self._old)
            self.target.rename(self._old)
        self.out.rename(self.target)
        journal.sync(self.target.parent)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Away with what a killed publishing of `folder` has left; not where another process holds it, or it is not ours
    to write: what is prepared is whole all the same.
    """
    work = Work(folder)
    if work.folder.exists() and not work.out.exists():
        with contextlib.suppress(UserError, OSError), work:
            work.remove()


def _same(handle: int, file: Path) -> bool:
    """Whether the open file still has its name: its last owner removes it."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False
