"""All documents in one call of torch's FlashAttention for variable lengths (CUDA, half precision)."""

import functools
import inspect

import torch
from torch import Tensor

LARGEST = 256  # channels of a head


@functools.cache
def _gqa() -> bool | None:
    """Whether torch's knows grouped queries; None where there is none, or none with windows (torch before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return "enable_gqa" in known if "window_size" in known else None


def usable(q_NHK: Tensor) -> bool:
    half, size = q_NHK.dtype in (torch.bfloat16, torch.float16), q_NHK.shape[2]
    return q_NHK.is_cuda and half and size % 8 == 0 and size <= LARGEST and _gqa() is not None


def packed_attention(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, starts: Tensor, longest: int, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = q_NHK.shape[1] != k_NGK.shape[1]
    if grouped and not _gqa():
        repeat = q_NHK.shape[1] // k_NGK.shape[1]
        k_NGK, v_NGK = k_NGK.repeat_interleave(repeat, 1), v_NGK.repeat_interleave(repeat, 1)
    known = {"enable_gqa": True} if grouped and _gqa() else {}
    sight = (-1 if window is None else window - 1, 0)  # tokens before and behind the query's own
    return varlen_attn(q_NHK, k_NGK, v_NGK, starts, starts, longest, longest, window_size=sight, **known)  # type: ignore[return-value]
