"""The mixture of experts against its equations in numpy and fp64, written out token by token.

B rows, T time, D model, E experts, S slots a token.
"""

import json
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from lamella.channels.mlp import Config as MlpConfig
from lamella.channels.moe import Config
from lamella.channels.moe.dispatch import dispatch
from lamella.channels.moe.router import Router, RouterOptions
from lamella.config import change, check_options, load_run
from lamella.errors import UserError
from lamella.model.stack import plan_layers
from lamella.nn.draw import Draw
from lamella.nn.record import Record
from lamella.nn.shard import Exchange, Whole
from lamella.train.balance import Balance
from tests.nn.building import OneOf, double, filled, noise, packed, relative

D_MODEL, E = 6, 4
LENGTHS, PADDING = [[5, 7], [1, 8], [12], [1]], [0, 3, 0, 11]
ROWS = packed(LENGTHS, PADDING)
REAL = ROWS.real_BT.numpy()

VARIANTS = {
    "Switch": {"top_k": 1, "capacity_factor": 1.0},
    "Switch, half of the room": {"top_k": 1, "capacity_factor": 0.5, "activation": "relu"},
    "dropless top-1": {"top_k": 1},
    "dropless top-2": {"top_k": 2},
    "renormalised": {"top_k": 3, "renormalize": True, "activation": "gelu"},
    "top-2 with capacity": {"top_k": 2, "capacity_factor": 0.8, "renormalize": True},
    "every expert": {"top_k": E},
    "shared": {"top_k": 2, "shared_d_ff": 10},
    "biased": {"top_k": 2, "bias_rate": 0.1, "renormalize": True},
    "expert choice": {"top_k": 2, "routing": "expert_choice"},
    "expert choice, less": {"top_k": 1, "routing": "expert_choice", "capacity_factor": 0.7, "shared_d_ff": 3},
    "small start": {"top_k": 2, "init_scale": 0.1},
    "shared, plain": {"top_k": 1, "shared_d_ff": 3, "activation": "relu", "capacity_factor": 0.6},
}


def config_for(**options):
    return check_options(Config, {"channel": "moe", "num_experts": E, "d_ff": 4, **options}, "moe")


BIAS = np.array([0.3, -0.2, 0.0, 0.1])  # of the mixtures with a bias_rate


def make(**options):
    config = config_for(**options)
    moe = filled(config.build(D_MODEL, double(), "here"), spread=0.7).double()
    moe.router.bias_E.copy_(torch.tensor(BIAS))
    return config, moe


def weights_of(moe):
    return {name: p.detach().numpy() for name, p in moe.named_parameters()}


def mlp(kind, w_in, w_out, x):
    h = w_in @ x
    gate, up = np.split(h, 2) if kind == "swiglu" else (h, 1)
    if kind == "gelu":
        return w_out @ (h * (1 + np.array([math.erf(v / math.sqrt(2)) for v in h])) / 2)
    return w_out @ (np.maximum(h, 0) if kind == "relu" else gate / (1 + np.exp(-gate)) * up)


def chances(w, x):
    score = np.exp(w["router.weight"] @ x)
    return score / score.sum()


def route(config, w, row, real):
    """One row's [(token, expert, weight)] that are computed, and how often each expert was chosen."""
    if config.routing == "expert_choice":
        return expert_choice(config, w, row, real)
    bias = BIAS if config.bias_rate else 0
    chosen = [np.argsort(-(chances(w, x) + bias), kind="stable")[: config.top_k] for x in row]
    room = [10**9] * E
    if config.capacity_factor is not None:
        room = [math.ceil(config.capacity_factor * config.top_k * len(row) / E)] * E
    slots, load = [], np.zeros(E)
    for choice in range(config.top_k):
        for t in range(len(row)):
            if not real[t]:
                continue
            expert = chosen[t][choice]
            load[expert] += 1
            if room[expert] == 0:
                continue
            room[expert] -= 1
            chance = chances(w, row[t])
            scale = chance[chosen[t]].sum() if config.renormalize else 1
            slots.append((t, expert, chance[expert] / scale))
    return slots, load


def expert_choice(config, w, row, real):
    """Each expert takes the tokens that it is likeliest for (arXiv 2202.09368, section 3.2)."""
    tokens = np.flatnonzero(real)
    take = math.ceil((config.capacity_factor or 1) * config.top_k * len(tokens) / E)
    chance = np.array([chances(w, row[t]) for t in tokens])
    slots = [(tokens[n], e, chance[n, e]) for e in range(E) for n in np.argsort(-chance[:, e])[:take]]
    return slots, np.full(E, take, float)


def mixture(config, w, row, real):
    y, kind = np.zeros_like(row), config.activation
    for t, expert, weight in route(config, w, row, real)[0]:
        y[t] += weight * mlp(kind, w["experts.w_in"][expert], w["experts.w_out"][expert], row[t])
    if config.shared_d_ff:
        y += [mlp(kind, w["shared_in.weight"], w["shared_out.weight"], x) for x in row]
    return y


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_equations(options):
    config, moe = make(**options)
    x = noise(4, 12, D_MODEL)
    wanted = [mixture(config, weights_of(moe), row, real) for row, real in zip(x.numpy(), REAL, strict=True)]
    assert relative(moe(x, ROWS), np.stack(wanted)) < 1e-13


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_gradients_are_right(options):
    """Of every parameter and the input, where a step of 1e-6 moves no choice."""
    _, moe = make(**options)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in moe.named_parameters()}

    def function(x, *values):
        return functional_call(moe, dict(zip(parameters, values, strict=True)), (x, ROWS))

    x = noise(4, 12, D_MODEL).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters.values()), atol=1e-7, rtol=1e-5, fast_mode=True)


def forced(choices, **options):
    """A mixture whose tokens choose as told: token t of the one row has the experts choices[t], in order."""
    config, moe = make(top_k=len(choices[0]), **options)
    with torch.no_grad():
        moe.router.weight.zero_()[:, :E] = 3 * torch.eye(E)
    x = noise(1, len(choices), D_MODEL, seed=4)
    for t, experts in enumerate(choices):
        x[0, t, :E] = 0
        for rank, expert in enumerate(experts):
            x[0, t, expert] = 2 - rank
    return config, moe, x


def test_overflow_passes_by_the_residual():
    _, moe, x = forced([[0], [0], [1], [0], [0], [2]], capacity_factor=4 / 3)  # room for two an expert
    y = moe(x, packed([[6]]))[0]
    assert [bool(token.any()) for token in y] == [True, True, True, False, False, True]


def test_overflow_keeps_the_shared_experts():
    _, moe, x = forced([[0], [0], [0], [0]], capacity_factor=1.0, shared_d_ff=5)
    shared = moe.shared_out(torch.nn.functional.silu(moe.shared_in(x)[0]) * moe.shared_in(x)[1])
    y = moe(x, packed([[4]]))
    assert torch.equal(y[0, 1:], shared[0, 1:])
    assert not torch.equal(y[0, 0], shared[0, 0])


def test_first_choices_come_before_second_ones():
    """Expert 0 has room for two: both go to the first choices at the end, not to the earlier second choices."""
    _, moe, x = forced([[1, 0], [2, 0], [0, 3], [0, 3]], capacity_factor=1.0)
    routing = moe.router(x, packed([[4]]))
    assert routing.expert_BTS[0].tolist() == [[1, E], [2, E], [0, 3], [0, 3]]
    assert torch.equal(routing.weight_BTS > 0, routing.expert_BTS < E)


def test_padding_takes_no_capacity_and_no_load():
    for end in (0, 3):  # whatever the padding would choose
        record = Record()
        rows = packed([[2]], [6], record=record)
        _, moe, x = forced([[0], [0]] + [[end]] * 6, capacity_factor=1.0)
        assert moe.router(x, rows).expert_BTS[0, :, 0].tolist() == [0, 0] + [E] * 6
        assert not moe(x, rows)[0, 2:].any()
        assert record.values["here/load"].tolist() == [4, 0, 0, 0]  # two tokens, routed twice


def test_capacity_is_per_row():
    _, moe, x = forced([[0], [0], [0], [1]], capacity_factor=1.0)
    pair = torch.cat([x, x])
    assert relative(moe(pair, packed([[4], [4]]))[1], moe(x, packed([[4]]))[0]) < 1e-14


def test_all_rows_padding():
    _, moe, x = forced([[0, 1]] * 3)
    x.requires_grad_()
    y = moe(x, packed([[]], [3], loss_scale=1.0))
    y.sum().backward()
    assert not y.any() and not x.grad.any() and not moe.router.weight.grad.any()


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    """None would leave a rank out of the collectives that the others wait in."""
    _, moe, x = forced([[0], [1], [0], [3]], aux_loss=0.0)
    moe(x, packed([[4]])).sum().backward()
    for weight in (moe.experts.w_in, moe.experts.w_out):
        assert not weight.grad[2].any()
        assert all(weight.grad[e].any() for e in (0, 1, 3))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_rows_that_no_slot_has(options):
    """On a GPU there are as many rows as slots that may be filled: values and gradients are the same."""
    _, moe = make(**options, dropout=0.3)
    rows = packed(LENGTHS, PADDING, row_numbers=[3, 17, 0, 5])
    found, filled_rows = [], []
    for exact in (True, False):
        x = noise(4, 12, D_MODEL).requires_grad_()
        slots = dispatch(moe.router(x, rows), E, exact=exact)
        y = moe.experts(slots.gather(x), slots.names(rows.where_BT), slots.counts_E, rows)
        y = slots.scatter(y, x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *moe.experts.parameters(), moe.router.weight))))
        filled_rows.append(len(slots.slot_M))
    assert filled_rows[0] == int(slots.counts_E.sum()) < filled_rows[1] <= moe.router(x, rows).most
    assert all(relative(got, want) < 1e-13 for got, want in zip(*found, strict=True))


def losses(config, weight, x, real):
    """Switch's equation 4 and ST-MoE's equation 5 for one row, differentiable."""
    logits = x[real] @ weight.t()
    chance = torch.softmax(logits, -1)
    chosen = torch.zeros_like(chance).scatter(1, chance.topk(config.top_k).indices, 1.0)
    share = chosen.sum(0) / (len(logits) * config.top_k)
    aux = E * sum(share[e] * chance[:, e].mean() for e in range(E))
    z = torch.stack([torch.log(torch.exp(token).sum()) ** 2 for token in logits]).mean()
    return aux, z


@pytest.mark.parametrize("options", [VARIANTS["Switch"], VARIANTS["dropless top-2"]], ids=["Switch", "top-2"])
def test_losses_reach_the_gradient_with_their_row_s_weight(options):
    config, moe = make(aux_loss=0.3, z_loss=0.07, **options)
    x, scale = noise(4, 12, D_MODEL).requires_grad_(), 0.25
    silent = packed(LENGTHS, PADDING, loss_scale=0.0)
    rows = packed(LENGTHS, PADDING, loss_scale=scale)
    weight = noise(4, 12, D_MODEL, seed=1)
    inputs = (x, *moe.parameters())
    added = sum(
        config.aux_loss * aux + config.z_loss * z
        for aux, z in (losses(config, moe.router.weight, x[b], ROWS.real_BT[b]) for b in range(4))
    )
    wanted = torch.autograd.grad((moe(x, silent) * weight).sum() + scale * added, inputs)
    got = torch.autograd.grad((moe(x, rows) * weight).sum(), inputs)
    without = torch.autograd.grad((moe(x, silent) * weight).sum(), inputs)
    assert all(relative(g, w) < 1e-13 for g, w in zip(got, wanted, strict=True))
    assert relative(got[1], without[1]) > 1e-3
    assert torch.equal(moe(x, rows), moe(x, silent))


def test_losses_have_the_weight_of_the_loss_and_not_of_the_output():
    """The output's gradient may be scaled or absent; the auxiliary loss's is what the row's scale says."""
    _, moe = make(aux_loss=0.3, z_loss=0.07)
    rows = packed(LENGTHS, PADDING, loss_scale=0.25)
    x = noise(4, 12, D_MODEL)
    none = torch.autograd.grad((0 * moe(x, rows)).sum(), moe.router.weight)[0]
    assert none.norm() > 0
    small, large = (torch.autograd.grad((s * moe(x, rows)).sum(), moe.router.weight)[0] for s in (1, 1000))
    assert relative(large - none, 1000 * (small - none)) < 1e-10


@pytest.mark.parametrize("options", [VARIANTS["Switch"], VARIANTS["top-2 with capacity"]], ids=["Switch", "top-2"])
def test_recorded_sums(options):
    config, moe = make(**options)
    record, x = Record(), noise(4, 12, D_MODEL)
    moe(x.requires_grad_(), packed(LENGTHS, PADDING, record=record))
    sums, x = record.values, x.detach()
    w = weights_of(moe)
    routes = [route(config, w, row, real) for row, real in zip(x.numpy(), REAL, strict=True)]
    by_row = [row[real] for row, real in zip(x.numpy(), REAL, strict=True)]
    tokens = [token for row in by_row for token in row]
    each = [losses(config, moe.router.weight, x[b], ROWS.real_BT[b]) for b in range(4)]
    entropy = sum(-(chances(w, token) * np.log(chances(w, token))).sum() for token in tokens)
    wanted = {
        "load": sum(load for _, load in routes),
        "kept": sum(len(slots) for slots, _ in routes),
        "entropy": entropy,
        "aux_loss": sum(aux for aux, _ in each),
        "z_loss": sum(z for _, z in each),
        "missed": sum(len(t) - len({slot[0] for slot in r[0]}) for r, t in zip(routes, by_row, strict=True)),
    }
    assert {f"here/{key}" for key in wanted} == set(sums)
    assert sums["here/kept"] < sums["here/load"].sum()  # some slots did overflow
    assert not any(value.requires_grad for value in sums.values())
    for key, value in wanted.items():
        assert relative(sums[f"here/{key}"], value) < 1e-6, key  # counts are fp32, the entropy's logarithm is guarded


def router(dtype=torch.float32, **options):
    given = {"top_k": 2, "routing": "top_k", "capacity_factor": None, "renormalize": False, "jitter": 0.0}
    given |= {"aux_loss": 0, "global_aux_loss": 0, "z_loss": 0, "bias_rate": 0, "init_scale": 1.0}
    return filled(Router(RouterOptions(E, **{**given, **options}), D_MODEL, Whole(dtype), "here"), spread=0.7)


def test_the_router_stays_fp32_under_bf16_activations():
    """Computed in bf16, chances 0.1 apart become equal and the choice is the first index's."""
    x = noise(4, 12, D_MODEL, dtype=torch.bfloat16)
    module = router(torch.bfloat16)
    logits = module.logits(x, ROWS)
    assert logits.dtype == torch.float32
    assert relative(logits, x.double() @ module.weight.double().t()) < 1e-6
    half, full = module(x, ROWS), module(x.float(), ROWS)
    assert half.weight_BTS.dtype == torch.float32
    assert torch.equal(half.weight_BTS, full.weight_BTS) and torch.equal(half.expert_BTS, full.expert_BTS)


def test_bf16_output_is_near_fp64():
    config, exact = make(top_k=2, shared_d_ff=4)
    moe = filled(config.build(D_MODEL, Whole(torch.bfloat16), "here"), spread=0.7)
    x = noise(4, 12, D_MODEL, dtype=torch.bfloat16)
    y = moe(x, ROWS)
    assert y.dtype == torch.bfloat16
    assert relative(y, exact(x.double(), ROWS)) < 0.02


def test_jitter_is_the_same_for_any_micro_batching():
    """A row's routing is a function of its number, not of the rows beside it or of their order."""
    module, x = router(jitter=0.4), noise(4, 12, D_MODEL, dtype=torch.float32)
    numbers = [3, 17, 0, 5]
    together = module(x, packed(LENGTHS, PADDING, row_numbers=numbers))
    for at in ([0], [2], [1, 3], [3, 0]):
        rows = packed([LENGTHS[b] for b in at], [PADDING[b] for b in at], row_numbers=[numbers[b] for b in at])
        apart = module(x[at], rows)
        assert torch.equal(apart.expert_BTS, together.expert_BTS[at])
        assert relative(apart.weight_BTS, together.weight_BTS[at]) < 1e-6


def test_jitter_multiplies_the_input_by_up_to_itself():
    module, x = router(jitter=0.4), torch.ones(4, 12, D_MODEL)
    with torch.no_grad():
        module.weight.copy_(torch.eye(E, D_MODEL))
    rows = packed(LENGTHS, PADDING, row_numbers=[0, 1, 2, 3])
    factor = module.logits(x, rows)
    assert 0.6 <= factor.min() < 0.65 and 1.35 < factor.max() < 1.4
    assert abs(factor.mean() - 1) < 0.05
    assert torch.equal(module.logits(x, ROWS), x[..., :E])  # none outside training


def test_jitter_differs_by_step_seed_and_place():
    x, rows = torch.ones(1, 12, D_MODEL), packed([[12]], row_numbers=[0])
    base = router(jitter=0.4).logits(x, rows)
    other = router(jitter=0.4)
    other.place = "there"
    draws = [Draw(seed=7, step=4, row_B=torch.tensor([0])), Draw(seed=8, step=3, row_B=torch.tensor([0]))]
    changed = [other.logits(x, rows)]
    for draw in draws:
        changed.append(router(jitter=0.4).logits(x, type(rows)(rows.document_BT, rows.position_BT, draw)))
    assert all(relative(c, base) > 0.01 for c in changed)


def test_the_jittered_input_does_not_reach_the_experts():
    _, moe = make(top_k=E, renormalize=True, jitter=0.5)
    with torch.no_grad():
        moe.router.weight.zero_()  # all chances are 1 / E, jitter or not
    x = noise(1, 12, D_MODEL)
    assert torch.equal(moe(x, packed([[12]], row_numbers=[0])), moe(x, packed([[12]])))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_matmul_flops_are_those_that_torch_counts(options):
    config = config_for(**{**options, "capacity_factor": None})  # what is dropped is not computed
    moe = filled(config.build(D_MODEL, Whole(), "here"))
    with FlopCounterMode(display=False) as counter:
        moe(noise(1, 12, D_MODEL, dtype=torch.float32), packed([[4, 8]]))
    assert counter.get_total_flops() == config.flops(D_MODEL, 12).matmul


def test_one_expert_is_the_dense_mlp():
    config = check_options(Config, {"channel": "moe", "num_experts": 1, "top_k": 1, "d_ff": 4}, "moe")
    moe = filled(config.build(D_MODEL, double(), "here")).double()
    dense = check_options(MlpConfig, {"channel": "mlp", "d_ff": 4}, "mlp").build(D_MODEL, double(), "here").double()
    dense.load_state_dict({"w_in.weight": moe.experts.w_in[0], "w_out.weight": moe.experts.w_out[0]})
    x = noise(4, 12, D_MODEL)
    assert relative(moe(x, ROWS), dense(x, ROWS) * ROWS.real_BT[..., None]) < 1e-14


def test_the_global_loss_looks_at_the_last_step_s_loads():
    _, moe = make(aux_loss=0.0, global_aux_loss=0.3)
    share = torch.tensor([0.7, 0.1, 0.2, 0.0], dtype=torch.float64)
    moe.router.load_E.copy_(share)
    x = noise(4, 12, D_MODEL)
    rows = packed(LENGTHS, PADDING, loss_scale=0.25)
    got = torch.autograd.grad(moe(x, rows).sum() * 0, moe.router.weight)[0]
    chance = [torch.softmax(x[b][ROWS.real_BT[b]] @ moe.router.weight.t(), -1) for b in range(4)]
    loss = 0.25 * 0.3 * sum(E * (share * c.mean(0)).sum() for c in chance)
    assert relative(got, torch.autograd.grad(loss, moe.router.weight)[0]) < 1e-12


def test_dropout_is_drawn_by_token_expert_and_channel():
    """The same for other rows beside it, and for a rank that holds other experts or other channels."""
    config, moe = make(top_k=E, renormalize=True, dropout=0.4)
    numbers, x = [3, 17, 0, 5], noise(4, 12, D_MODEL)
    together = moe(x, packed(LENGTHS, PADDING, row_numbers=numbers))
    alone = moe(x[[2]], packed([LENGTHS[2]], [PADDING[2]], row_numbers=[numbers[2]]))
    assert relative(alone[0], together[2]) < 1e-13
    assert relative(together, moe(x, ROWS)) > 0.1
    hidden = torch.ones(1000, 2 * config.d_ff, dtype=torch.float64)
    rows = packed([[1000]], row_numbers=[0])
    one, third = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1000, 0])
    kept = moe.experts._hidden(hidden, rows.where_BT[0], third, rows)
    assert abs(float((kept == 0).double().mean()) - 0.4) < 0.03
    outside = moe.experts._hidden(hidden[:1], rows.where_BT[0, :1], one, packed([[1]]))
    assert float(kept.max()) == pytest.approx(float(outside.max()) / 0.6)
    halves = []
    for rank in range(2):
        part = config.build(D_MODEL, OneOf(rank, 2), "here").experts
        halves.append(part._hidden(hidden[:, : config.d_ff], rows.where_BT[0], third, rows))
    assert torch.equal(torch.cat(halves, 1), kept)
    shard = double()
    shard.exchange = Exchange(1, 2)
    dealt = config.build(D_MODEL, shard, "here").experts
    assert torch.equal(dealt._hidden(hidden, rows.where_BT[0], third[2:], rows), kept)  # its first is the third of all


def test_margins():
    _, moe, x = forced([[0, 1], [2, 3]])
    chance = moe.router.logits(x, packed([[2]])).softmax(-1)[0].sort(descending=True).values
    assert relative(moe.router.margin(x, packed([[2]]))[0], chance[:, 1] - chance[:, 2]) < 1e-12
    assert moe.router.margin(x, packed([[1]], [1]))[0, 1] == math.inf
    _, moe = make(routing="expert_choice", top_k=1)
    x = noise(1, 8, D_MODEL)
    chance = moe.router.logits(x, packed([[8]])).softmax(-1)[0].sort(0, descending=True).values
    assert relative(moe.router.margin(x, packed([[8]]))[0], chance[1] - chance[2]) < 1e-12


def test_the_bias_follows_the_loads_and_evens_them_out():
    """arXiv 2408.15664: over the rate's steps the loads of tokens that all like one expert become even."""
    biased = ["model.parts.moe.bias_rate=0.004", "model.parts.moe.top_k=1"]
    model = load_run("configs/run/quickstart.yaml", biased).model
    part = plan_layers(model)[1].channel
    assert isinstance(part, Config)
    moe = filled(part.build(D_MODEL, Whole(), "layer1/channel"))
    with torch.no_grad():
        moe.router.weight[0] += 0.6 * torch.ones(D_MODEL)
    x, spread = noise(8, 64, D_MODEL, dtype=torch.float32) + 0.5, []
    balance = Balance(model, moe)
    assert set(balance.state) == {"layer1/channel", "layer3/channel"}
    for _ in range(400):
        record = Record()
        moe.router(x, packed([[64]] * 8, record=record))
        load = record.values["layer1/channel/load"]
        spread.append(float(load.max() / load.mean()))
        before = moe.router.bias_E.clone()
        balance.update(record.values | {"layer3/channel/load": load})
        moved = moe.router.bias_E - before
        assert torch.allclose(moved, 0.004 * (load.mean() - load).sign().float(), atol=1e-6)
        assert relative(moe.router.load_E, load / load.sum()) < 1e-6
    assert spread[0] > 3 > 1.5 > spread[-1]
    other = Balance(model, moe)
    other.restore(json.loads(json.dumps(balance.state)))
    assert other.state == balance.state


@pytest.mark.parametrize("method", [{}, {"aux_loss": 0.05}, {"global_aux_loss": 0.05}, {"bias_rate": 0.02}], ids=str)
def test_an_expert_that_would_take_all_does_not(method):
    """Tokens that need different experts, and a router that starts with one for all: it collapses without balancing."""
    options = {"top_k": 1, "aux_loss": 0.0, "num_experts": 4, "d_ff": 8} | method
    config = check_options(Config, {"channel": "moe", **options}, "moe")
    moe = filled(config.build(D_MODEL, Whole(), "layer1/channel"), spread=0.1)
    model = load_run("configs/run/quickstart.yaml").model
    model = change(model, parts={**model.parts, "moe": {"channel": "moe", **options}})
    balance = Balance(model, moe)
    with torch.no_grad():
        moe.router.weight[0] = 1.0
    x = noise(8, 32, D_MODEL, dtype=torch.float32) + 0.7
    targets = torch.tanh(x.roll(1, dims=-1) * 2) * x.sign().roll(2, dims=-1)
    optimizer = torch.optim.Adam(moe.parameters(), lr=0.01)
    for _ in range(120):
        record = Record()
        rows = packed([[32]] * 8, loss_scale=1 / 8, record=record)
        (moe(x, rows) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        load = record.values["layer1/channel/load"]
        balance.update({f"layer{i}/channel/load": load for i in (1, 3)})
    largest = float(load.max() / load.sum())
    assert largest > 0.9 if not method else largest < 0.6, largest


def test_experts_that_choose_take_no_bias():
    with pytest.raises(UserError, match="tokens that choose"):
        config_for(routing="expert_choice", bias_rate=0.1).build(D_MODEL, Whole(), "here")


def test_more_choices_than_experts():
    with pytest.raises(UserError, match="top_k=5 exceeds num_experts=4"):
        config_for(top_k=5).build(D_MODEL, Whole(), "here")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_hold_every_element_once(size):
    small = config_for(shared_d_ff=8).shrink(size, 1)
    ranks = [dict(small.build(8, OneOf(rank, size), "here").named_parameters()) for rank in range(size)]
    for name, first in ranks[0].items():
        held = torch.zeros(first.place.shape)
        for parameters in ranks:
            for box in parameters[name].place.boxes:
                held[box.whole_slices] += 1
        assert torch.equal(held, torch.full_like(held, size if first.place.replicated else 1))
