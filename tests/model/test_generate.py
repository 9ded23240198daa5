"""Generation: what a batch goes on with is what the whole model says of each row alone."""

import dataclasses

import pytest
import torch

from lamella.config import ModelConfig, check_options
from lamella.errors import UserError
from lamella.mixers.base import config_of
from lamella.model import generate as module
from lamella.model.generate import GREEDY, Generation, Sampling, choose, generate
from lamella.model.lm import LanguageModel
from lamella.nn.rows import Rows, one_document
from lamella.nn.shard import Whole
from tests.mixers.cases import CASES, D_MODEL, IDS
from tests.nn.building import double, filled, noise, packed, relative

EOD, PIECES, VOCAB = 2, 37, 40  # the embedding holds three rows that are no piece
LENGTHS = [5, 0, 1, 17, 9]
OPTIONS = {
    "attention": {"mixer": "attention", "num_heads": 2, "rope_theta": 100.0},
    "grouped": {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2, "rope_theta": 50.0, "qk_norm": True},
    "window": {"mixer": "attention", "num_heads": 2, "num_kv_heads": 1, "window": 4, "rope_theta": 10.0},
    "mamba": {"mixer": "mamba", "d_state": 3, "dt_rank": 2},
}
STACKS = {
    "attention": ["attention/mlp", "grouped/mlp"],
    "window": ["window/mlp", "window/-"],
    "mamba": ["mamba/mlp", "mamba/-"],
    "hybrid": ["mamba/mlp", "window/moe", "grouped/mlp", "mamba/moe"],
}


def make(stack, seed=0):
    channels = {"mlp": {"channel": "mlp", "d_ff": 9}, "moe": {"channel": "moe", "num_experts": 4, "d_ff": 6}}
    tree = {"d_model": 16, "vocab_size": VOCAB, "parts": OPTIONS | channels, "stack": [{"layers": STACKS[stack]}]}
    return filled(LanguageModel(ModelConfig.model_validate(tree, strict=False)), seed).requires_grad_(False)


def prompts(lengths=LENGTHS, seed=3):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, PIECES, (n,), generator=random).tolist() for n in lengths]


def full_logits(model, ids):
    """Of the id behind each prefix that begins with the eod and all of the prompt: one forward over everything."""
    tokens = torch.tensor([[EOD, *ids]], dtype=torch.int32)
    return model(tokens, one_document(tokens))[0, :, :PIECES]


@pytest.mark.parametrize("chunk", [256, 4])
@pytest.mark.parametrize("stack", STACKS)
def test_greedy_is_the_argmax_of_the_whole_forward(stack, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = make(stack)
    together = generate(model, prompts(), EOD, PIECES, 24, GREEDY)
    assert {len(out) for out in together} >= {24}
    for ids, out in zip(prompts(), together, strict=True):
        logits = full_logits(model, ids + out)[len(ids) :]
        wanted = logits.argmax(-1).tolist()
        assert out == wanted[: len(out)]
        assert len(out) == 24 or wanted[len(out)] == EOD
        assert out == generate(model, [ids], EOD, PIECES, 24, GREEDY)[0]


def test_rows_leave_and_the_others_go_on():
    model, lengths = make("hybrid"), {7: 3, 8: 4, 9: 1, 10: 5, 11: 3}
    batch, out = Generation(model, prompts(), EOD, PIECES, GREEDY, first=7), {row: [] for row in lengths}
    while batch.rows:
        for row, token in batch.step():
            out[row].append(token)
        batch.leave(row for row in lengths if len(out[row]) == lengths[row])
    assert {row: len(ids) for row, ids in out.items()} == lengths
    for (row, ids), prompt in zip(out.items(), prompts(), strict=True):
        assert ids == generate(model, [prompt], EOD, PIECES, lengths[row], GREEDY)[0]


def test_an_end_of_document_ends_a_row():
    model = make("mamba")
    out = generate(model, prompts(), EOD, PIECES, 40, Sampling(temperature=3.0, seed=1))
    assert min(map(len, out)) < 40
    assert all(EOD not in row for row in out)


def test_draws_do_not_depend_on_the_batch():
    model, sampling = make("hybrid"), Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=5)
    together = generate(model, prompts(), EOD, PIECES, 16, sampling)
    for row, ids in enumerate(prompts()):
        batch, out = Generation(model, [ids], EOD, PIECES, sampling, first=row), []
        while len(out) < len(together[row]):
            out += [token for _, token in batch.step()]
        assert out == together[row]
    assert generate(model, prompts(), EOD, PIECES, 16, dataclasses.replace(sampling, seed=6)) != together


def test_a_continued_text_draws_as_the_text_itself():
    """The position counts from the document's start, so ten tokens and then ten more are twenty tokens."""
    model, sampling, ids = make("hybrid"), Sampling(temperature=1.0, seed=2), prompts()[0]
    whole = generate(model, [ids], EOD + 100, PIECES, 20, sampling)[0]
    assert generate(model, [ids + whole[:10]], EOD + 100, PIECES, 10, sampling)[0] == whole[10:]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=5.0)], ids=str)
def test_ids_that_are_no_piece_are_never_chosen(sampling):
    model = make("mamba")
    model.head.weight[PIECES] = 100 * model.head.weight[0]
    model.head.weight[PIECES + 1] = -model.head.weight[PIECES]  # one of the two is the likeliest of all
    first = torch.tensor([[EOD]])
    assert model(first, one_document(first))[0, 0].argmax() >= PIECES
    out = generate(model, prompts([0] * 20), EOD + 100, PIECES, 20, sampling)
    assert {token for row in out for token in row} <= set(range(PIECES))


LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.0, 2.5])
MANY = 4000


def drawn(sampling):
    """The share of each id among draws at many positions."""
    position = torch.arange(MANY) % 40
    row = torch.arange(MANY) // 40
    where = zip(row.split(40), position.split(40), strict=True)
    return torch.cat([choose(LOGITS.expand(40, -1), sampling, *at) for at in where]).bincount(minlength=5) / MANY


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4]),
        (Sampling(temperature=0.5), [0, 1, 2, 3, 4]),
        (Sampling(temperature=1.0, top_k=3), [0, 3, 4]),
        (Sampling(temperature=1.0, top_k=9), [0, 1, 2, 3, 4]),
        (Sampling(temperature=2.0, top_p=0.75), [0, 3, 4]),
        (Sampling(temperature=1.0, top_p=0.6), [0, 4]),
        (Sampling(temperature=1.0, top_p=1e-9), [4]),
        (Sampling(temperature=1e-300), [4]),
        (Sampling(temperature=0), [4]),
    ],
    ids=str,
)
def test_ids_are_drawn_by_their_chance(sampling, kept):
    scores = LOGITS.double() / max(sampling.temperature, 1e-3)
    wanted = torch.zeros(5, dtype=torch.double)
    wanted[kept] = scores[kept].softmax(-1)
    share = drawn(sampling)
    assert (share[wanted == 0] == 0).all()
    assert (share - wanted).abs().max() <= 4 * (0.25 / MANY) ** 0.5


def test_a_diverged_model_is_told():
    model = make("mamba")
    model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="diverged"):
        generate(model, prompts(), EOD, PIECES, 4, GREEDY)


@pytest.fixture(params=CASES, ids=IDS)
def mixer(request):
    name, options = request.param
    config = check_options(config_of(name), {"mixer": name, **options}, name)
    return filled(config.build(D_MODEL, 1e-5, double())).double().requires_grad_(False)


def test_a_state_is_tensors_with_the_rows_first(mixer):
    """So that rows can leave a batch whatever the mixer keeps: what is left goes on as if they had never been there."""
    x, rows, state = noise(3, 9, D_MODEL), packed([[9]] * 3), {}
    whole = mixer(x, rows)
    mixer(x[:, :7], Rows(rows.document_BT[:, :7], rows.position_BT[:, :7]), state)
    assert all(isinstance(value, torch.Tensor) and len(value) == 3 for value in state.values())
    kept = torch.tensor([2, 0])
    state = {name: value[kept] for name, value in state.items()}
    for t in (7, 8):
        some = Rows(rows.document_BT[kept, t : t + 1], rows.position_BT[kept, t : t + 1])
        assert relative(mixer(x[kept, t : t + 1], some, state)[:, 0], whole[kept, t]) < 1e-12


@pytest.mark.parametrize("window", [None, 3, 64, 100, 500])
def test_the_cache_grows_and_turns(window):
    """Rows at different lengths, more tokens than the first room, a window smaller, as large and larger than that."""
    options = {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2, "window": window, "rope_theta": 100.0}
    config = check_options(config_of("attention"), options, "attention")
    mixer = filled(config.build(D_MODEL, 1e-5, double())).double().requires_grad_(False)
    rows, state, out = packed([[150, 60], [210], [7, 203]]), {}, []
    x, start = noise(3, 210, D_MODEL), 0
    for length in [20, 1, 1, 70] + [1] * 118:
        time = slice(start, start := start + length)
        out.append(mixer(x[:, time], Rows(rows.document_BT[:, time], rows.position_BT[:, time]), state))
        assert state["k"].shape[2] <= min(window or 512, max(64, 2 * start))
    assert start == 210
    assert relative(torch.cat(out, 1), mixer(x, rows)) < 1e-12


def test_a_recurrence_keeps_as_much_after_many_tokens_as_after_one():
    model = make("mamba")
    batch, kept = Generation(model, prompts([4]), EOD, PIECES, GREEDY), []
    for _ in range(50):
        batch.step()
        kept.append([v.shape for state in batch._states.values() for v in state.values()])
    assert all(shapes == kept[0] for shapes in kept)


def test_bf16_computes_in_bf16():
    model = make("hybrid")
    low = LanguageModel(model.config, Whole(torch.bfloat16))
    low.load_state_dict(model.state_dict())
    tokens = torch.tensor([[EOD, *prompts()[3]]])
    batch = Generation(low, [prompts()[3]], EOD, PIECES, GREEDY)
    assert batch._logits_BV.dtype == torch.bfloat16
    assert relative(batch._logits_BV, model(tokens, one_document(tokens))[:, -1]) < 0.05
