"""The compiled CPU kernels: one C library beside this file, built at installation where there is a compiler.

It has no Python interface and no runtime of its own: functions take sizes, a range of tasks, and pointers. Threads are
Python's (a call holds no lock), as many as torch has; more than the cores would only wait.
"""

import ctypes
import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LANES = 64  # channels of a task, as native.h says


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built."""
    found = importlib.util.find_spec("lamella_kernels._native")
    return ctypes.CDLL(found.origin) if found is not None and found.origin else None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def usable(*tensors: Tensor | None) -> bool:
    """Whether the library is there and fits: everything on the CPU, floating point of at most 32 bits."""
    given = [t for t in tensors if t is not None]
    small = (torch.float32, torch.bfloat16, torch.float16)
    fits = all(t.device.type == "cpu" and t.dtype in small and not isinstance(t, FakeTensor) for t in given)
    return fits and not torch.compiler.is_compiling() and library() is not None


def plain(tensor: Tensor) -> Tensor:
    """The values in fp32, in order."""
    return tensor.detach().to(torch.float32).contiguous()


def call(name: str, sizes: ctypes.Structure, tasks: int, work: int, tensors: list[Tensor | None]) -> None:
    """A function of the library over all tasks, cut evenly over torch's threads.

    It takes the sizes, a first and a last task, the tensors' memory (contiguous; None is NULL), and `work` rows of
    lanes that are the thread's own.
    """
    function = getattr(library(), name)
    assert all(t is None or t.is_contiguous() for t in tensors)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]

    def run(first: int, last: int) -> None:
        own = torch.empty(work * LANES)
        range_ = ctypes.c_int64(first), ctypes.c_int64(last)
        function(ctypes.byref(sizes), *range_, *pointers, ctypes.c_void_p(own.data_ptr()))

    threads = min(torch.get_num_threads(), tasks)
    cuts = [tasks * i // threads for i in range(threads + 1)]
    if threads == 1:
        run(0, tasks)
    else:
        list(_pool(threads).map(run, cuts[:-1], cuts[1:]))
