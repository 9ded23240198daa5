"""This process among the others: found out from its environment, joined to them in groups."""

import dataclasses
import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lamella.errors import UserError
from lamella.parallel import cpu_host
from lamella.parallel.allocator import keep_memory
from lamella.parallel.layout import Layout


@dataclasses.dataclass(frozen=True)
class Seat:
    """Where a launcher (torchrun, `lamella train --nproc`) has put this process."""

    rank: int
    world: int
    local_rank: int
    local_world: int


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The process groups of a layout."""

    seat: Seat
    layout: Layout
    device: torch.device
    tensor: ProcessGroup
    data: ProcessGroup

    @property
    def tensor_rank(self) -> int:
        return self.tensor.rank()

    @property
    def data_rank(self) -> int:
        return self.data.rank()

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run: prints, writes the metrics."""
        return self.seat.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        dist.all_reduce(values)
        return values

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())


def find_seat() -> Seat:
    """Reads what the launcher set; a process started by hand is a world of one. Raises UserError if some is missing."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return Seat(0, 1, 0, 1)
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"the launcher set {', '.join(found)} but not {', '.join(missing)}; use torchrun or --nproc")
    return Seat(*(int(found[name]) for name in names[:4]))


def join(seat: Seat, layout: Layout, timeout: float = 1800) -> Mesh:
    """Joins the processes into the groups of the layout. Collectives that take longer than `timeout` seconds fail."""
    import deepspeed
    from megatron.core import parallel_state

    device = cpu_host.device(seat.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(_threads(seat))
        keep_memory()
    if seat.world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout),
        auto_mpi_discovery=False,
        verbose=False,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor, create_gloo_process_groups=False
    )
    tensor, data = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
    assert isinstance(tensor, ProcessGroup) and isinstance(data, ProcessGroup)
    return Mesh(seat, layout, device, tensor, data)


def _threads(seat: Seat) -> int:
    """The user's OMP_NUM_THREADS, else a share of the cores: threads that outnumber them wait for each other."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // seat.local_world)


def leave() -> None:
    """Waits for all, and destroys every process group."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
