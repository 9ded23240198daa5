"""How DCP's plans become files: a writer that publishes a checkpoint at once or not at all, and its reader.

The files are DCP's own format (torch.save of each piece, one file a rank, `.metadata`), so DCP's tools read them too.
DCP's writer keeps a copy of all that it has written until it is done; this one holds a piece at a time. DCP's reader
loads a saved piece once for every box that wants part of it, and unpickles; this one copies once, out of the file as it
is mapped, and reads the pickles as data.
"""

import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from lamella.checkpoint import manifest
from lamella.checkpoint.metadata import read_metadata
from lamella.checkpoint.saved import Saved, read_saved
from lamella.errors import UserError

Produce = Callable[[], bytes]
VALUES = "run.json"
ALIGNED = 64  # bytes; torch.save aligns a tensor within what it writes, and so it is aligned in the file
UNPUBLISHED = ".tmp"  # a folder whose name ends so is being written or being deleted; nobody reads it


class Writer(FileSystemWriter):
    """Writes into NAME.tmp, and renames to NAME when all of it is on the disk. DCP calls the methods in this order.

    Whatever one rank's method raises, DCP raises on all ranks.
    """

    def __init__(self, path: Path, values: dict[str, Any], beside: dict[str, Produce]):
        self.folder, self.final, self.values, self.beside = unpublished(path), path, values, beside
        super().__init__(self.folder)
        self.values_json = b""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            self.values_json = json.dumps(self.values, indent=1).encode()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the folder. On the coordinator alone, when all ranks have planned and none has written yet."""
        if self.final.exists():
            raise UserError(f"{self.final}: already saved; delete it, or give the run another name")
        if self.folder.exists():  # of a save that was interrupted
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with manifest.Sealed(self.folder / name) as file:
                buffer = io.BytesIO()  # one for all: fresh memory costs as much as the copy into it
                for item in plan.items:
                    with _serialised(planner.resolve_data(item), buffer) as data:
                        place = _StorageInfo(name, file.bytes, len(data))
                        results.append(WriteResult(item.index, len(data), place))
                        file.write(data)
                        file.write(bytes(-file.bytes % ALIGNED))
            results.append(WriteResult(MetadataIndex(name), file.bytes, file.entry))
        done = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publishes. On the coordinator alone, when every rank has written and synced."""
        entries = [r.storage_data for r in itertools.chain(*results) if isinstance(r.storage_data, manifest.Entry)]
        pieces = [[r for r in rank if not isinstance(r.storage_data, manifest.Entry)] for rank in results]
        super().finish(metadata, pieces)
        entries.append(manifest.measure(self.folder / ".metadata"))
        entries.append(manifest.seal(self.folder / VALUES, self.values_json))
        entries += [manifest.seal(self.folder / name, produce()) for name, produce in self.beside.items()]
        manifest.write(self.folder, entries)
        manifest.sync(self.folder)
        self.folder.rename(self.final)
        manifest.sync(self.final.parent)


class Reader(FileSystemReader):
    """Reads the metadata at once. Raises UserError, OSError."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.metadata = read_metadata(path / ".metadata")
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        places = {index: self.storage_data[index] for index in wanted}
        in_order = sorted(wanted, key=lambda index: (places[index].relative_path, places[index].offset))
        for name, indices in itertools.groupby(in_order, key=lambda index: places[index].relative_path):
            for index in indices:
                saved = read_piece(Path(self.path) / name, places[index])
                for item in wanted[index]:
                    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(saved[box])
                    planner.commit_tensor(item, target)
        done = Future()
        done.set_result(None)
        return done


def unpublished(path: Path) -> Path:
    return path.with_name(path.name + UNPUBLISHED)


def _serialised(tensor: Tensor | io.BytesIO, buffer: io.BytesIO) -> memoryview:
    assert isinstance(tensor, Tensor)
    # Through memory: where torch.save writes to a file, a full disk comes out as an error about the zip format.
    # And by way of numpy, because torch.save writes the whole storage that a view is a part of.
    flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
    buffer.seek(0)
    with _without_crc():
        torch.save(torch.from_numpy(flat.numpy()).view(tensor.dtype).view(tensor.shape), buffer)
    return buffer.getbuffer()[: buffer.tell()]


@contextmanager
def _without_crc() -> Iterator[None]:
    """The zip format's own checksums take longer than the digest that says the same."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def read_piece(path: Path, place: _StorageInfo) -> Tensor:
    """A piece of a file, where the metadata say that it lies: a view of the file. Raises UserError."""
    found = read_saved(path, place.offset, place.length)
    if not isinstance(found, Saved):
        raise UserError(f"{path}: holds something other than a tensor at {place.offset}")
    return found.tensor()
