"""Operators of sequence mixers for PyTorch, each with its own backward and exact isolation of packed documents.

An operator is a folder: `__init__.py` is the public function, `reference.py` the equation step by step, `eager.py`
the fast form in plain torch, `gpu.py` its Triton kernels. The package needs torch only; with triton it is fast on CUDA.
"""

from lamella_kernels.attention import packed_attention
from lamella_kernels.causal_conv1d import causal_conv1d
from lamella_kernels.grouped_gemm import grouped_gemm
from lamella_kernels.linear_attention import linear_attention
from lamella_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_sum_exp
from lamella_kernels.moe_permute import moe_permute, moe_unpermute
from lamella_kernels.rmsnorm import rmsnorm
from lamella_kernels.rotary import rotary
from lamella_kernels.selective_scan import selective_scan
from lamella_kernels.ssd import ssd
from lamella_kernels.swiglu import swiglu
from lamella_kernels.wkv6 import wkv6
from lamella_kernels.wkv7 import wkv7

__all__ = [
    "causal_conv1d",
    "grouped_gemm",
    "linear_attention",
    "linear_cross_entropy",
    "linear_log_sum_exp",
    "moe_permute",
    "moe_unpermute",
    "packed_attention",
    "rmsnorm",
    "rotary",
    "selective_scan",
    "ssd",
    "swiglu",
    "wkv6",
    "wkv7",
]
