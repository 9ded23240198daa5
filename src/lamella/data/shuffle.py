"""Order by a hash of (key, index): numpy's generators may change their streams between versions, and a resumed run must
find its rows again.
"""

import numpy as np


def hashes(count: int, *key: int) -> np.ndarray:
    """A number for each of 0 .. count - 1, uint64."""
    return draws(np.arange(count, dtype=np.uint64), *key)


def draws(index: np.ndarray, *key: int) -> np.ndarray:
    """The numbers of some indices (uint64), uint64."""
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _mix(state ^ np.uint64(word))
    return _mix(state ^ index)


def permutation(count: int, *key: int) -> np.ndarray:
    """The order of 0 .. count - 1 by their hashes, int64."""
    return np.argsort(hashes(count, *key), kind="stable")


def _mix(words: np.ndarray) -> np.ndarray:
    """splitmix64's step (Steele, Lea & Flood 2014): one bit in changes half of the bits out."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
