"""What every mixer owes: causal, isolated, the same in one piece or many, right gradients, memory linear in time."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from lamella.config import check_options
from lamella.errors import UserError
from lamella.mixers.base import config_of, names
from lamella.nn.shard import Whole
from tests.mixers.cases import CASES, D_MODEL, IDS, OPTIONS
from tests.nn.building import Largest, OneOf, double, filled, noise, packed, relative, some

# Documents of one token, of more than a window and a kernel, boundaries at other times in each row, padding.
ROWS = packed([[4, 1, 8], [13], [6, 5]], padding=[0, 0, 2])
TIME = ROWS.position_BT.shape[1]


@pytest.fixture(params=CASES, ids=IDS)
def config(request):
    name, options = request.param
    try:
        return check_options(config_of(name), {"mixer": name, **options}, name)
    except UserError as error:
        pytest.fail(f"mixer {name} needs options: give it a line in tests/mixers/cases.py ({error})")


def build(config, shard=None):
    shard = shard or double()
    mixer = filled(config.build(D_MODEL, 1e-5, shard))
    return mixer.double() if shard.dtype == torch.float64 else mixer


def stream(rows=ROWS, seed=0, dtype=torch.float64):
    return noise(*rows.position_BT.shape, D_MODEL, seed=seed, dtype=dtype)


def output_and_gradient(mixer, x, rows):
    x = x.clone().requires_grad_()
    y = mixer(x, rows)
    weight = noise(*y.shape, seed=1, dtype=y.dtype)
    return y.detach(), torch.autograd.grad(y, x, weight)[0]


def document_slices(rows=ROWS):
    for b, row in enumerate(rows.document_BT.tolist()):
        for d in sorted(set(row) - {-1}):
            start = row.index(d)
            yield b, slice(start, start + row.count(d))


def test_every_case_belongs_to_a_mixer():
    assert set(OPTIONS) <= set(names())


def test_is_named_as_its_file(config):
    assert config.build.__module__ == f"lamella.mixers.{config.mixer}"


def test_causal(config):
    mixer, x = build(config), stream()
    y = mixer(x, ROWS)
    for t in range(TIME):
        changed = x.clone()
        changed[:, t] += 1
        z = mixer(changed, ROWS)
        assert torch.equal(z[:, :t], y[:, :t])
        assert not torch.equal(z[:, t], y[:, t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_documents_are_isolated(config, dtype):
    """Bit-identical, outputs and input gradients, whatever another document holds and wherever it is cut."""
    mixer = build(config, Whole(dtype))
    x = stream(dtype=dtype)
    y, dx = output_and_gradient(mixer, x, ROWS)
    for b, here in document_slices():
        others = torch.ones(x.shape[:2], dtype=torch.bool)
        others[b, here] = False
        changed = torch.where(others[..., None], 3 * stream(seed=5, dtype=dtype), x)
        cut = ROWS.position_BT.clone()
        cut[others] = 0  # now every other document is many of one token
        for rows in (ROWS, type(ROWS)(ROWS.document_BT, cut)):
            z, dz = output_and_gradient(mixer, changed, rows)
            assert torch.equal(z[b, here], y[b, here])
            assert torch.equal(dz[b, here], dx[b, here])


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)
def test_documents_alone_equal_packed(config, dtype, limit):
    mixer = build(config, Whole(dtype))
    x = stream(dtype=dtype)
    weight = noise(*x.shape, seed=1, dtype=dtype)
    y, dx = output_and_gradient(mixer, x, ROWS)
    for b, here in document_slices():
        alone = x[b : b + 1, here].clone().requires_grad_()
        z = mixer(alone, packed([[alone.shape[1]]]))
        dz = torch.autograd.grad(z, alone, weight[b : b + 1, here])[0]
        assert relative(z[0], y[b, here]) < limit
        assert relative(dz[0], dx[b, here]) < limit


@pytest.mark.parametrize("chunks", [[1] * 13, [5, 8], [2, 2, 4, 1, 3, 1], [12, 1], [13]], ids=str)
def test_chunks_with_the_state_handed_over_equal_the_whole(config, chunks):
    """The rows' documents start before, in, at the start and at the end of chunks; some chunks hold several."""
    mixer, x, state, pieces, start = build(config), stream(), {}, [], 0
    for length in chunks:
        time = slice(start, start := start + length)
        pieces.append(mixer(x[:, time], some(ROWS, time=time), state))
    assert relative(torch.cat(pieces, 1), mixer(x, ROWS)) < 1e-13


def test_a_new_document_forgets_the_state(config):
    mixer, x, rows = build(config), stream(), packed([[13], [6, 7], [13]])
    state = {}
    mixer(stream(seed=3), packed([[13], [2, 11], [5, 8]]), state)
    assert relative(mixer(x, rows, state), mixer(x, rows)) < 1e-13


def test_gradients_are_right(config):
    rows = packed([[3, 2], [5]])
    mixer, x = build(config), stream(rows)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}

    def function(x, *values):
        return functional_call(mixer, dict(zip(parameters, values, strict=True)), (x, rows))

    inputs = (x.requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)
    # The fast mode projects on one direction; every parameter by itself shows a gradient that is missing.
    gradients = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    assert all(g.norm() > 0 for g in gradients)


def test_bf16_is_near_fp64(config):
    """Norms, softmax, scans and their parameters stay in fp32, so that only the projections round."""
    x = stream(dtype=torch.bfloat16)
    y, dx = output_and_gradient(build(config, Whole(torch.bfloat16)), x, ROWS)
    exact, dexact = output_and_gradient(build(config), x.double(), ROWS)
    assert y.dtype == dx.dtype == torch.bfloat16
    assert relative(y, exact) < 0.02
    assert relative(dx, dexact) < 0.03


@pytest.mark.parametrize("lengths", [[600], [1, 350, 249]], ids=str)
def test_no_tensor_is_quadratic_in_time(config, lengths):
    mixer, rows = build(config, Whole()), packed([lengths])
    x = stream(rows, dtype=torch.float32)
    with Largest() as largest:
        output_and_gradient(mixer, x, rows)
    assert 0 < largest.elements < 600 * 600 / 2


def test_matmul_flops_are_those_that_torch_counts(config):
    """The projections are mm and addmm; a bmm is inside a kernel (a scan, softmax attention) and counted by formula."""
    mixer, rows = build(config, Whole()), packed([[11]])
    with FlopCounterMode(display=False) as counter:
        mixer(stream(rows, dtype=torch.float32), rows)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert counted == config.flops(D_MODEL, 11).matmul


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shrunk_is_divisible_and_its_ranks_hold_every_element_once(config, size):
    small = config.shrink(size)
    ranks = [dict(small.build(16, 1e-5, OneOf(rank, size)).named_parameters()) for rank in range(size)]
    for name, first in ranks[0].items():
        held = torch.zeros(first.place.shape)
        for parameters in ranks:
            place = parameters[name].place
            assert sum(math.prod(box.size) for box in place.boxes) == parameters[name].numel()
            for box in place.boxes:
                held[box.whole_slices] += 1
        assert torch.equal(held, torch.full_like(held, size if first.place.replicated else 1))
        assert sum(p[name].place.owner for p in ranks) == (1 if first.place.replicated else size)


def test_sizes_that_do_not_divide_are_the_users_to_mend(config):
    with pytest.raises(UserError, match="tensor=7"):
        config.build(D_MODEL, 1e-5, OneOf(0, 7))
