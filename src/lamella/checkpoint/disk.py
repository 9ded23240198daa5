"""What a disk refuses, as one line with its cure."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamella.errors import UserError

CURES = {
    errno.ENOSPC: "free some space, or keep fewer checkpoints",
    errno.EDQUOT: "free some space, or keep fewer checkpoints",
    errno.ENOENT: "every machine must see this folder; choose one on a file system that they share",
    errno.ENOTDIR: "a file stands where a folder should be; move it away",
    errno.EEXIST: "a file stands where a folder should be; move it away",
}
OTHER_CURE = "choose a folder that can be read and written"


@contextmanager
def disk_errors(path: Path, what: str) -> Iterator[None]:
    """Raises UserError for an OSError within."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, what) from error


def disk_error(error: OSError, path: Path, what: str) -> UserError:
    where = f" {error.filename}" if error.filename and str(error.filename) != str(path) else ""
    cure = CURES.get(error.errno or 0, OTHER_CURE)
    return UserError(f"{path}: {what}: {error.strerror or error}{where}; {cure}")
