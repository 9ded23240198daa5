"""One pair of channels at a time turned by its angle (Su et al. 2021, arXiv 2104.09864).

(x_i, x_{i + R/2})  turned by  position * theta^(-2i / R)
"""

import torch
from torch import Tensor


def rotary(x_BTHK: Tensor, position_BT: Tensor, theta: float, width: int) -> Tensor:
    """y in x's dtype; gradients come from autograd."""
    channels = list(x_BTHK.double().unbind(-1))
    for i in range(width // 2):
        angle_BT1 = position_BT.double().unsqueeze(-1) * theta ** (-2 * i / width)
        a, b = channels[i], channels[i + width // 2]
        channels[i] = a * torch.cos(angle_BT1) - b * torch.sin(angle_BT1)
        channels[i + width // 2] = b * torch.cos(angle_BT1) + a * torch.sin(angle_BT1)
    return torch.stack(channels, -1).to(x_BTHK.dtype)
