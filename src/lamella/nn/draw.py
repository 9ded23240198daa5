"""Random numbers as a pure function of where they are used: (seed, step, row, position, place in the model, channel).

No generator, no state, no order of calls: every layout, micro-batch and resumed run draws the same numbers. The bits
come from the 64-bit finaliser of MurmurHash3 (Appleby, public domain) over a counter, keyed by seed, step and place.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Draw:
    """The draws of some rows of one step. `row_B`: the rows' numbers inside the step, int64."""

    seed: int
    step: int
    row_B: Tensor

    def where(self, time_T: Tensor) -> Tensor:
        """What names each token of the rows among all of the step, int64 [B, T]."""
        return self.row_B[:, None] * 2**32 + time_T[None, :]

    def uniform(self, place: str, time_T: Tensor, channels: int) -> Tensor:
        """Uniform in [0, 1), [B, T, channels] fp32; `place` names the user, `time_T` the tokens' indices in the row."""
        return self.at(place, self.where(time_T), torch.arange(channels, device=self.row_B.device))

    def at(self, place: str, where: Tensor, channels: Tensor) -> Tensor:
        """The same for any tokens, named by `where`, and channels, by their index: [*where.shape, channels]."""
        return _uniform(where[..., None] ^ self._key(place), channels)

    def among(self, places: Sequence[str], which: Tensor, where: Tensor, channels: Tensor) -> Tensor:
        """The same where tokens have places of their own: `which` of them, like `where`."""
        keys = torch.tensor([self._key(place) for place in places], device=where.device)
        return _uniform((where ^ keys[which])[..., None], channels)

    def _key(self, place: str) -> int:
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{place}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)


def _uniform(token: Tensor, channels: Tensor) -> Tensor:
    bits = _mix(_mix(token) + channels)
    return (bits & (2**24 - 1)).float() * 2**-24


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's fmix64 on int64 (products wrap)."""
    for factor in (-49064778989728563, -4265267296055464877):
        x = (x ^ _shift(x)) * factor
    return x ^ _shift(x)


def _shift(x: Tensor) -> Tensor:
    return (x >> 33) & (2**31 - 1)  # >> on int64 is arithmetic; the mask makes it logical
