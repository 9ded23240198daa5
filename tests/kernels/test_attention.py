"""Attention of packed documents: the equation, in every form, and what it refuses.

torch's FlashAttention runs on CUDA alone. Elsewhere a stand-in takes its place that reads the arguments as torch
documents them, so that what is handed to it is tested here too.
"""

import pytest
import torch
from torch.nn.attention import varlen

from lamella_kernels import packed_attention
from lamella_kernels.attention import flash, reference
from tests.nn.building import Largest, relative

LENGTHS = [1, 63, 20, 100, 73]
SIZES = {"one head": (1, 1, 16), "grouped": (4, 2, 8), "as many": (3, 3, 24)}
WINDOWS = [None, 2, 30, 500]


def inputs(heads, groups, size, dtype, device="cpu"):
    random = torch.Generator().manual_seed(7)
    shapes = ((sum(LENGTHS), n, size) for n in (heads, groups, groups))
    made = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]
    return [t.to(device, dtype).requires_grad_() for t in made]


def found(form, tensors, window):
    """Output and gradients."""
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    y = form(*copies, LENGTHS, window=window)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view_as(y))
    return [y.detach(), *(t.grad for t in copies)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_equals_the_equation(sizes, window, dtype, limit):
    tensors = inputs(*sizes, dtype)
    wanted = found(reference.packed_attention, [t.double() for t in tensors], window)
    for ours, exact in zip(found(packed_attention, tensors, window), wanted, strict=True):
        assert ours.dtype == dtype and relative(ours.double(), exact) < limit


def documented(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """`varlen_attn` by its documentation, a document at a time."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == max_k == int(cu_q.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    repeat, pieces = query.shape[1] // key.shape[1], []
    for start, end in zip(cu_q.tolist()[:-1], cu_q.tolist()[1:], strict=True):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        t, s = torch.arange(end - start)[:, None], torch.arange(end - start)
        left, right = window_size
        seen = (s <= t + right) & ((s >= t - left) if left >= 0 else True)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        pieces.append((weights @ v).transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("gqa", [True, False], ids=["torch's groups", "groups repeated"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_flash_equals_the_equation(sizes, window, gqa, monkeypatch):
    cuda = torch.cuda.is_available()
    tensors = inputs(*sizes, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    if not cuda:
        monkeypatch.setattr(varlen, "varlen_attn", documented)
        monkeypatch.setattr(flash, "usable", lambda q: True)
    monkeypatch.setattr(flash, "_gqa", lambda: gqa)
    wanted = found(reference.packed_attention, [t.double() for t in tensors], window)
    for ours, exact in zip(found(packed_attention, tensors, window), wanted, strict=True):
        assert relative(ours.double(), exact) < (0.02 if cuda else 2e-6)


def test_flash_takes_half_precision_on_a_gpu():
    assert flash._gqa() is not None  # torch has it, with windows
    assert not flash.usable(torch.empty(5, 2, 16, dtype=torch.bfloat16))
    if torch.cuda.is_available():
        taken = {
            (d, k): flash.usable(torch.empty(5, 2, k, dtype=d, device="cuda"))
            for d in (torch.half, torch.float)
            for k in (12, 64, 512)
        }
        assert [key for key, value in taken.items() if value] == [(torch.half, 64)]


@pytest.mark.parametrize("window", [None, 30])
def test_no_mask_over_all_tokens(window):
    q, k, v = (t.detach() for t in inputs(2, 2, 8, torch.float32))
    with Largest() as largest:
        packed_attention(q, k, v, LENGTHS, window=window)
    assert largest.elements <= 2 * 100 * 100


REFUSED = {
    "groups": (
        lambda q, k, v: (q, k[:, :0].new_zeros(257, 3, 8), v.new_zeros(257, 3, 8), LENGTHS),
        {},
        "no multiple of 3",
    ),
    "lengths": (lambda q, k, v: (q, k, v, [256]), {}, "of sum 257"),
    "an empty document": (lambda q, k, v: (q, k, v, [*LENGTHS, 0]), {}, "1 or more"),
    "dtypes": (lambda q, k, v: (q, k.double(), v, LENGTHS), {}, "of one floating dtype"),
    "shapes": (lambda q, k, v: (q[:9], k, v, LENGTHS), {}, "N is 9"),
    "window": (lambda q, k, v: (q, k, v, LENGTHS), {"window": 0}, "window must be 1 or more"),
}


@pytest.mark.parametrize("change, options, message", REFUSED.values(), ids=REFUSED)
def test_refuses(change, options, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*change(*inputs(4, 2, 8, torch.float32)), **options)
