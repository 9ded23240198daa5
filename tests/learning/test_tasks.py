"""The tasks are what the paper describes, and nano models of the mixers learn induction as it leads one to expect.

Induction heads, trained at up to 64 tokens, 350 steps of 1,024 tokens, seed 0: the share of 128 rows told rightly.

    length       64     128     256     512    1024
    rwkv7       1.00    1.00    1.00    1.00    0.80
    mamba       1.00    1.00    1.00    0.98    0.75
    rwkv6       1.00    1.00    1.00    0.90    0.56
    mamba2      1.00    1.00    0.75    0.49    0.24
    retention   1.00    0.84    0.63    0.41    0.22
    attention   1.00    0.98    0.88    0.33    0.05      chance: 0.06

Selective copying of 16 symbols behind 256 tokens, 2,000 steps of 1,088 tokens, seeds 0, 1 and 2, the share of the
symbols of 64 rows: mamba 0.86, 0.87, 0.81, rwkv7 0.84, 0.94, 0.95, mamba2 0.82, 0.89, 0.82, rwkv6 0.42, 0.79, 0.78,
attention 0.44, 0.45, 0.69, retention 0.41, 0.39, 0.50, by chance 0.06.
"""

import functools

import pytest
import torch
from torch import Generator

from lamella.mixers.base import names
from tests.learning import learn, tasks
from tests.learning.nano import MIXERS


def random(seed=0) -> Generator:
    return Generator().manual_seed(seed)


def test_every_mixer_has_a_nano_model():
    assert set(MIXERS) == set(names())


def test_selective_copying_asks_for_the_symbols_in_their_order():
    tokens, targets = tasks.selective_copying(5, 40, 6, random())
    assert tokens.shape == targets.shape == (5, 46)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert [t for t in row[:40] if t != tasks.NOISE] == wanted[40:]
        assert row[40:] == [tasks.MARK] * 6 and wanted[:40] == [-1] * 40
    places = (tokens[:, :40] < tasks.SYMBOLS).nonzero()[:, 1].view(5, 6)
    assert len({tuple(row) for row in places.tolist()}) == 5


def test_induction_asks_for_what_followed_the_mark():
    tokens, targets = tasks.induction_heads(300, 9, random())
    seen = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        place = row.index(tasks.MARK)
        assert row.count(tasks.MARK) == 2 and row[-1] == tasks.MARK
        assert wanted == [-1] * 8 + [row[place + 1]] and wanted[-1] < tasks.SYMBOLS
        seen.add(place)
    assert seen == set(range(7))  # anywhere that a symbol may follow


def test_rows_are_made_by_the_seed_alone():
    for make in (learn.ramp("copying", 1.0)[1], learn.ramp("induction", 1.0)[1]):
        assert torch.equal(make(4, random(3))[0], make(4, random(3))[0])
        assert not torch.equal(make(4, random(3))[0], make(4, random(4))[0])


@pytest.mark.parametrize(
    ("task", "lengths"), [("induction", [8, 16, 32, 64]), ("copying", [*range(3, 48, 3), 48, 80, 144, 272])]
)
def test_rows_grow_to_the_length_that_is_tested(task, lengths):
    ramp = [learn.ramp(task, step / 100) for step in range(100)]
    assert sorted({length for length, _ in ramp}) == lengths == sorted(set(length for length, _ in ramp))
    assert all(make(1, random())[0].shape == (1, length) for length, make in ramp)


def test_accuracy_looks_at_what_is_asked():
    logits = torch.eye(4)[torch.tensor([[0, 1, 2, 3]])]
    assert tasks.accuracy(logits, torch.tensor([[-1, 1, -1, 2]])) == 0.5


# Well below what is in the table: of 128 rows a share of 0.5 is uncertain by 0.04, and the seed moves the longest ones.
LEAST = {
    "rwkv7": {64: 0.95, 128: 0.95, 256: 0.9, 512: 0.7, 1024: 0.3},
    "mamba": {64: 0.95, 128: 0.95, 256: 0.9, 512: 0.7, 1024: 0.3},
    "rwkv6": {64: 0.95, 128: 0.95, 256: 0.9, 512: 0.6},
    "mamba2": {64: 0.95, 128: 0.9, 256: 0.5},
    "retention": {64: 0.95, 128: 0.65, 256: 0.4},
    "attention": {64: 0.95, 128: 0.8},
}
copying, induction = functools.cache(learn.copying), functools.cache(learn.induction)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mixer", LEAST)
def test_induction_is_learned(mixer):
    found = induction(mixer)
    assert {n: found[n] for n, least in LEAST[mixer].items() if found[n] < least} == {}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_mamba_goes_on_beyond_the_length_it_was_trained_at_and_attention_does_not():
    mamba, attention = induction("mamba"), induction("attention")
    assert attention[1024] < 0.2
    assert mamba[512] > attention[512] + 0.2 and mamba[1024] > attention[1024] + 0.2


COPIED = {"mamba": 0.6, "mamba2": 0.6, "rwkv7": 0.6, "attention": 0.25, "rwkv6": 0.2, "retention": 0.2}


# Wide: seeds lie up to 0.37 apart.
@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mixer", COPIED)
def test_selective_copying_is_learned(mixer):
    assert copying(mixer) > COPIED[mixer]


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_mamba_copies_more_than_a_mixer_whose_decay_is_fixed():
    assert copying("mamba") > copying("retention") + 0.2
