"""The one place that answers device questions for a machine without CUDA. Import it before megatron-core or DeepSpeed.

megatron-core's mappings allocate on `torch.cuda.current_device()`; on a CPU machine that is the CPU. DeepSpeed would
compile a shared-memory extension for minutes on its first CPU start; gloo serves as well.
"""

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

with warnings.catch_warnings():  # both announce missing optional packages, and their own deprecations
    warnings.simplefilter("ignore")
    import deepspeed
    import megatron.core  # noqa: F401

warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)  # both still call them
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of optimizers it has not been tested with
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def device(local_rank: int) -> torch.device:
    """The device of this process."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
