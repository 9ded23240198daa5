"""Rows out and back on the CPU against one slot at a time: values, gradients, order, what is refused."""

import pytest
import torch

from lamella_kernels.moe_permute import moe_permute, moe_unpermute, reference
from tests.kernels.building import mapping, source

SIZES = [(1, 1, 0.0, 0), (9, 2, 0.0, 0), (9, 3, 0.4, 2), (6, 8, 0.9, 0), (4, 2, 1.0, 3), (3, 2, 1.0, 0), (0, 2, 0.0, 0)]


def make(tokens, choices, dropped, unused, dtype=torch.float64, channels=5):
    slot_M, place_NS = mapping(tokens, choices, dropped, unused)
    normal = source(0)
    x, y = (normal(rows, channels).to(dtype).requires_grad_() for rows in (tokens, len(slot_M)))
    weight = normal(tokens, choices).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return x, y, weight, slot_M, place_NS


def values_and_gradients(permute, unpermute, x, y, weight, slot, place, dtype):
    out = permute(x, slot, place), unpermute(y, weight, slot, place)
    driven = [source(1)(*t.shape).to(dtype).to(t.dtype) for t in out]
    return *(t.detach() for t in out), *torch.autograd.grad(out, (x, y, weight), driven, materialize_grads=True)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_one_slot_at_a_time(sizes, dtype):
    given = make(*sizes, dtype)
    ours = values_and_gradients(moe_permute, moe_unpermute, *given, dtype)
    wide = [t.detach().double().requires_grad_() for t in given[:3]]
    wanted = values_and_gradients(reference.moe_permute, reference.moe_unpermute, *wide, *given[3:], dtype)
    for got, want in zip(ours, wanted, strict=True):
        assert got.shape == want.shape and (got.double() - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()
    assert [t.dtype for t in ours] == [dtype] * 4 + [given[2].dtype]


def test_gradcheck():
    x, y, weight, slot, place = make(4, 3, 0.3, 2)
    assert torch.autograd.gradcheck(lambda x: moe_permute(x, slot, place), x)
    assert torch.autograd.gradcheck(lambda y, w: moe_unpermute(y, w, slot, place), (y, weight))


def test_only_what_needs_a_gradient_gets_one():
    _, y, weight, slot, place = make(4, 2, 0.3, 1)
    (dy,) = torch.autograd.grad(moe_unpermute(y, weight.detach(), slot, place).sum(), y)
    (dweight,) = torch.autograd.grad(moe_unpermute(y.detach(), weight, slot, place).sum(), weight)
    assert dy.shape == y.shape and dweight.shape == weight.shape


def test_back_again():
    """A mean over a token's copies is the token."""
    x, _, _, slot, place = make(9, 4, 0.0, 0)
    weight = torch.full((9, 4), 0.25, dtype=x.dtype)
    assert torch.allclose(moe_unpermute(moe_permute(x, slot, place), weight, slot, place), x, rtol=1e-14)


def test_sums_in_half_precision_are_rounded_once():
    """256 ones on 256 of them: a running sum in bf16 would stay at 256."""
    slot, y = torch.arange(512), torch.ones(512, 3, dtype=torch.bfloat16)
    assert moe_unpermute(y, torch.ones(1, 512), slot, slot[None]).unique().tolist() == [512]
    x = torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)
    moe_permute(x, slot, slot[None]).sum().backward()
    assert x.grad is not None and x.grad.unique().tolist() == [512]


def test_sums_are_of_one_token():
    """Bit for bit what they are without the others."""
    _, y, weight, slot, place = make(9, 3, 0.0, 0, torch.float32, 70)
    together = moe_unpermute(y, weight, slot, place)
    for n in range(9):
        order = torch.arange(3)
        alone = moe_unpermute(y[place[n]], weight[n : n + 1], order, order[None])
        assert torch.equal(alone[0], together[n])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 5)}, "N is 3 in x_ND"),
        ({"x": torch.zeros(4, 5, dtype=torch.int32)}, "x_ND must be floating point"),
        ({"slot": torch.zeros(8)}, "slot_M must be int32 or int64"),
        ({"slot": torch.zeros(9, dtype=torch.int64)}, "has 9 rows, but 4 tokens have 2 choices"),
        ({"place": torch.zeros(8, dtype=torch.int64)}, "needs 2 dims"),
    ],
    ids=str,
)
def test_wrong_inputs_are_named(change, message):
    x, _, _, slot, place = make(4, 2, 0.0, 0, torch.float32)
    with pytest.raises(ValueError, match=message):
        moe_permute(change.get("x", x), change.get("slot", slot), change.get("place", place))


def test_wrong_weights_are_named():
    _, y, weight, slot, place = make(4, 2, 0.0, 0, torch.float32)
    with pytest.raises(ValueError, match="S is 2 in weight_NS"):
        moe_unpermute(y, weight, slot, place[:, :1])
