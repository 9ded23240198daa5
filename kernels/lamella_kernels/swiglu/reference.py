"""silu(gate) up in fp32, or fp64 of fp64 (Shazeer 2020, arXiv 2002.05202)."""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y in gate's dtype; gradients come from autograd."""
    compute = torch.float64 if gate.dtype == torch.float64 else torch.float32
    wide, other = gate.to(compute), up.to(compute)
    return (wide / (1 + torch.exp(-wide)) * other).to(gate.dtype)
