"""One slot at a time.

    x_m = x_n(m)        y_n = sum over s of w_ns y_place(n,s)

N token, S choice, M row, D channel.
"""

import torch
from torch import Tensor


def moe_permute(x_ND: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
    """The rows in x's dtype; gradients come from autograd."""
    choices = place_NS.shape[1]
    rows = [x_ND[slot // choices] if slot >= 0 else 0 * x_ND[0] for slot in slot_M.tolist()]
    return torch.stack(rows) if rows else x_ND[:0]


def moe_unpermute(y_MD: Tensor, weight_NS: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
    """The sums in y's dtype; gradients come from autograd."""
    y_ND = []
    for n, places in enumerate(place_NS.tolist()):
        total = y_MD.sum(0) * 0 * weight_NS[n].sum()
        for s, place in enumerate(places):
            if place >= 0:
                total = total + weight_NS[n, s] * y_MD[place]
        y_ND.append(total.to(y_MD.dtype))
    return torch.stack(y_ND) if y_ND else y_MD[:0]
