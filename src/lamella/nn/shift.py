"""RWKV's token shift (Peng et al. 2023, arXiv 2305.13048): a token's input mixed with the one before it.

    mixed_t = x_t + mu (x_{t-1} - x_t)        x_{t-1} := 0 at a document's start
"""

import torch
from torch import Tensor

from lamella.nn.rows import Rows


def shift(x_BTD: Tensor, rows: Rows, state: dict[str, Tensor] | None, name: str) -> Tensor:
    """x_{t-1} - x_t, [B, T, D]. A state keeps each row's last token under `name`, [B, D]."""
    past_BD = torch.zeros_like(x_BTD[:, 0]) if state is None else state.get(name, torch.zeros_like(x_BTD[:, 0]))
    if state is not None:
        state[name] = x_BTD[:, -1]
    before_BTD = torch.cat([past_BD.unsqueeze(1), x_BTD[:, :-1]], 1)
    return before_BTD * ~rows.reset_BT.unsqueeze(-1) - x_BTD
