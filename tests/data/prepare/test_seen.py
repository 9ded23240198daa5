"""Exact duplicates: as a Python set would tell them, in a fraction of its memory, also over a kill."""

import random

import numpy as np
import pytest

from lamella.data.prepare.seen import WIDTH, Seen


@pytest.mark.parametrize("bits", [4, 8, 128])
def test_as_a_set_tells(tmp_path, bits):
    """Few bits: many copies, and digests that share their upper halves."""
    rng = random.Random(bits)
    seen, known = Seen(tmp_path / "seen"), set()
    for call in range(60):
        high = [rng.getrandbits(min(bits, 64)) for _ in range(rng.randrange(0, 50))]
        digests = [h.to_bytes(8) + rng.getrandbits(min(bits, 64)).to_bytes(8) for h in high]
        expected = []
        for digest in digests:
            expected.append(digest in known)
            known.add(digest)
        assert seen.add(b"".join(digests)).tolist() == expected
        if call in (20, 40):  # a kill: what was synced stays, what came behind does not
            count = seen.sync()
            seen.add(rng.randbytes(WIDTH * 5))
            seen.close()
            seen = Seen(tmp_path / "seen", count)
    assert seen.count * WIDTH == seen.sync() * WIDTH == (tmp_path / "seen").stat().st_size
    seen.close()


def test_memory(tmp_path):
    rng = np.random.default_rng(0)
    seen = Seen(tmp_path / "seen")
    for _ in range(50):
        seen.add(rng.bytes(WIDTH * 2000))
    seen.close()
    runs = [half.nbytes for run in seen._runs for half in run]
    assert sum(runs) == WIDTH * 100_000 and len(runs) <= 2 * 17
