"""Which form of an operator runs: its Triton kernels ("gpu") on CUDA, plain torch ("eager") elsewhere.

    with forms.use("eager"):        # or "gpu", also for CPU tensors in Triton's interpreter: tests and benches
        y = rmsnorm(x)

An operator asks `on_gpu` of its tensors and imports its gpu.py only then: triton is optional. What runs on the CPU, the
compiled kernel or plain torch, is `native.usable`'s business.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Form = Literal["gpu", "eager"]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Not a context variable: CUDA's backward, and what it recomputes, runs in a thread of autograd's own.
_asked: list[Form] = []


def operators() -> list[str]:
    """The packages of operators that have Triton kernels."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/gpu.py"))


@contextmanager
def use(form: Form) -> Iterator[None]:
    """Every operator in this form, as far as it takes the tensors."""
    if form == "gpu" and not HAS_TRITON:
        raise RuntimeError("the gpu form needs triton: pip install triton")
    _asked.append(form)
    try:
        yield
    finally:
        _asked.pop()


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels take them: on CUDA with triton installed, floating point of at most 32 bits."""
    given = [t for t in tensors if t is not None]
    if not all(t.dtype in TYPES for t in given):
        return False
    return _asked[-1] == "gpu" if _asked else HAS_TRITON and all(t.is_cuda for t in given)
