"""The counter-based draws: a pure function of where they are used, and evenly spread however they are cut."""

import hashlib

import pytest
import torch

from lamella.nn.draw import Draw

ROWS, TIME, CHANNELS = 6, 500, 40


def uniform(rows=range(ROWS), time=range(TIME), channels=CHANNELS, seed=1, step=2, place="layer0"):
    return Draw(seed, step, torch.tensor(list(rows))).uniform(place, torch.tensor(list(time)), channels)


BASE = uniform()


def test_is_a_pure_function_of_place():
    assert torch.equal(uniform(), BASE)
    assert torch.equal(uniform(rows=[4]), BASE[4:5])
    assert torch.equal(uniform(rows=[5, 0, 3]), BASE[[5, 0, 3]])
    assert torch.equal(uniform(time=range(100, 107)), BASE[:, 100:107])
    assert torch.equal(uniform(channels=7), BASE[..., :7])
    torch.randn(3)  # nobody else's draw moves it
    assert torch.equal(uniform(), BASE)


def test_stays_the_same_between_versions():
    """A resumed run draws what the stopped one would have. Here the same in Python's own integers."""

    def fmix64(x):
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ x >> 33) * factor % 2**64
        return x ^ x >> 33

    rows, time, seed, step = [0, 2**31 + 5], [0, 7], 0, 12
    key = int.from_bytes(hashlib.sha256(b"0/12/x").digest()[:8], "little")
    bits = [fmix64((fmix64((r << 32) + t ^ key) + c) % 2**64) % 2**24 for r in rows for t in time for c in (0, 1)]
    got = Draw(seed, step, torch.tensor(rows)).uniform("x", torch.tensor(time), 2)
    assert (got * 2**24).long().flatten().tolist() == bits
    assert bits[:2] == [15276886, 412791]


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"seed": 2**40}, {"step": 3}, {"place": "layer1"}, {"rows": range(ROWS, 2 * ROWS)}],
    ids=lambda other: next(iter(other)),
)
def test_other_places_are_independent(other):
    assert correlation(BASE, uniform(**other)) < 4
    assert (uniform(**other) == BASE).float().mean() < 1e-4


def test_is_uniform():
    """Mean, variance and 64 bins within four standard deviations of what chance gives."""
    count = BASE.numel()
    assert BASE.min() >= 0 and BASE.max() < 1 and BASE.dtype == torch.float32
    x = BASE.double()
    assert abs(x.mean() - 1 / 2) < 4 * (1 / 12 / count) ** 0.5
    assert abs(x.var() - 1 / 12) < 4 * (1 / 180 / count) ** 0.5
    bins = torch.histc(x, 64, 0, 1)
    chi_squared = ((bins - count / 64) ** 2 / (count / 64)).sum()
    assert abs(chi_squared - 63) < 4 * (2 * 63) ** 0.5
    above = (x.flatten().sort().values - torch.arange(count) / count).abs().max()
    assert above < 1.95 / count**0.5  # Kolmogorov-Smirnov at one in a thousand


def test_lowest_bits_are_even_too():
    bits = (BASE.double() * 2**24).long()
    for bit in (0, 1, 12, 23):
        assert abs((bits >> bit & 1).double().mean() - 1 / 2) < 4 * (1 / 4 / BASE.numel()) ** 0.5


def correlation(a, b):
    """In standard deviations of what independent draws give."""
    a, b = a.double() - 1 / 2, b.double() - 1 / 2
    return float((a * b).mean().abs() * 12 * a.numel() ** 0.5)


@pytest.mark.parametrize("lag", [1, 2, 3, 16])
def test_neighbours_are_independent(lag):
    assert correlation(BASE[:, lag:], BASE[:, :-lag]) < 4
    assert correlation(BASE[..., lag:], BASE[..., :-lag]) < 4
    # Token t + 1, channel c against token t, channel c + 1: a counter that adds the two would repeat itself.
    assert correlation(BASE[:, lag:, :-lag], BASE[:, :-lag, lag:]) < 4
    if lag < ROWS:
        assert correlation(BASE[lag:], BASE[:-lag]) < 4
        assert correlation(BASE[lag:, :-lag], BASE[:-lag, lag:]) < 4


def test_every_row_and_channel_is_uniform_by_itself():
    """The largest of all the means stays within what so many means may reach."""
    for dims, count in (((1, 2), TIME * CHANNELS), ((0, 1), ROWS * TIME), ((0, 2), ROWS * CHANNELS)):
        assert (BASE.double().mean(dims) - 1 / 2).abs().max() < 4.5 * (1 / 12 / count) ** 0.5
