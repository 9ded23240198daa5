"""This process among the others: joined to them in groups."""

import dataclasses
import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lamella.parallel import cpu_host
from lamella.parallel.allocator import keep_memory
from lamella.parallel.layout import Layout
from lamella.parallel.seat import Seat


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The process groups of a layout."""

    seat: Seat
    layout: Layout
    device: torch.device
    tensor: ProcessGroup
    data: ProcessGroup
    pipeline: ProcessGroup
    model: ProcessGroup  # tensor x pipeline: what holds one copy of the model
    ends: ProcessGroup | None  # the pipeline's first and last stage; None on a rank that holds neither
    expert: ProcessGroup
    expert_data: ProcessGroup  # the ranks that hold the same experts

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


def join(seat: Seat, layout: Layout, timeout: float = 1800) -> Mesh:
    """Joins the processes into the groups of the layout. Collectives that take longer than `timeout` seconds fail."""
    import deepspeed

    device = cpu_host.device(seat.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(_threads(seat))
        keep_memory()
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout),
        auto_mpi_discovery=False,
        verbose=False,
    )
    return Mesh(seat, layout, device, **_groups(layout))


def _groups(layout: Layout) -> dict[str, Any]:
    from megatron.core import parallel_state as megatron

    megatron.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    return {
        "tensor": megatron.get_tensor_model_parallel_group(),
        "data": megatron.get_data_parallel_group(),
        "pipeline": megatron.get_pipeline_model_parallel_group(),
        "model": megatron.get_model_parallel_group(),
        "ends": megatron.get_embedding_group(check_initialized=False),
        "expert": megatron.get_expert_model_parallel_group(),
        "expert_data": megatron.get_expert_data_parallel_group(),
    }


def _threads(seat: Seat) -> int:
    """The user's OMP_NUM_THREADS, else a share of the cores: threads that outnumber them wait for each other."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // seat.local_world)


def leave() -> None:
    """Waits for all, and destroys every process group."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
