"""DCP's `.metadata`, which is a pickle, read with the names alone that it is made of: nothing else is ever called."""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from lamella.errors import UserError

DCP = "torch.distributed.checkpoint"
NAMES = {
    "pathlib.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",  # of a layout's name
    f"{DCP}.filesystem._StorageInfo",
    *(
        f"{DCP}.metadata.{name}"
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16")),
    *(f"torch.{name}" for name in ("int64", "int32", "int16", "int8", "uint8", "bool")),
}


def read_metadata(path: Path) -> Metadata:
    """Raises UserError where the file is no such pickle, or names what does not belong there; OSError."""
    with path.open("rb") as file:
        try:
            found = _Unpickler(file, path).load()
        except (UserError, OSError):
            raise
        except Exception as error:  # damaged bytes lead anywhere
            raise UserError(f"{path}: not the metadata of a checkpoint ({type(error).__name__})") from None
    if not isinstance(found, Metadata):
        raise UserError(f"{path}: not the metadata of a checkpoint")
    return found


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in NAMES:
            raise UserError(f"{self.path}: holds {module}.{name}, which is never loaded; take another checkpoint")
        return super().find_class(module, name)
