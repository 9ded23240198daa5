"""Mamba-1's selective scan in Triton (`kernels.py`): time cut into segments where rows and channels are too few.

B batch, T time, I channel, N state.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lamella_kernels.ops import cdiv, launch, power_of_2, register
from lamella_kernels.selective_scan import kernels
from lamella_kernels.tiles import tiles


def _tile(name: str, x: Tensor, A: Tensor) -> tuple[dict[str, int], int, int, int]:
    """The kernel's constants, and how many blocks of channels, segments, and tokens in a segment there are."""
    batch, time, _ = x.shape
    channels, states = map(int, A.shape)
    every = tiles("selective_scan_forward", N=states)["EVERY"]
    tile = tiles(name, N=states)
    tile |= {"EVERY": every, "I": channels, "N": states, "WIDE": power_of_2(states)}
    tile["BLOCK"] = max(1, tile.pop("SIZE") // tile["WIDE"])
    blocks = cdiv(channels, tile["BLOCK"])
    share = cdiv(cdiv(time, cdiv(tile.pop("PROGRAMS"), batch * blocks)), every) * every
    return tile, blocks, cdiv(time, share), share


def _empty(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _starts(
    start: Tensor | None, operands: tuple[Tensor, ...], reset: Tensor | None, back: bool, tile: dict[str, int],
    blocks: int, segments: int, share: int,
) -> Tensor:  # fmt: skip
    """The states before all segments, or the gradients behind them: [B, S, I, N]."""
    x, _, A, _ = operands
    (batch, time, channels), states = x.shape, A.shape[1]
    decay, found = (_empty(batch, segments - 1, channels, states, like=x) for _ in range(2))
    launch(
        kernels.local, (blocks * batch * (segments - 1),),
        *operands, reset, decay, found, time, segments, share,
        BACK=back, **{name: size for name, size in tile.items() if name != "EVERY"},
    )  # fmt: skip
    result = _empty(batch, segments, channels, states, like=x)
    join = tiles("selective_scan_join")
    launch(
        kernels.joined, (batch, cdiv(channels * states, join["BLOCK"])),
        decay, found, start, result, segments, SIZE=channels * states, BACK=back, **join,
    )  # fmt: skip
    return result


def _run(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, reset: Tensor | None,
    initial: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, time, channels), states = x.shape, A.shape[1]
    tile, blocks, segments, share = _tile("selective_scan_forward", x, A)
    start = _starts(initial, (x, dt, A, B), reset, False, tile, blocks, segments, share)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = _empty(batch, channels, states, like=x)
    kept = _empty(batch if keep else 0, cdiv(time, tile["EVERY"]), channels, states, like=x)
    launch(
        kernels.forward, (blocks * batch * segments,),
        x, dt, A, B, C, D, reset, start, y, final, kept if keep else None, time, segments, share, **tile,
    )  # fmt: skip
    return y, final, kept


def _run_backward(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    reset: Tensor | None, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, time, channels), states = x.shape, A.shape[1]
    tile, blocks, segments, share = _tile("selective_scan_backward", x, A)
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    end = _starts(dfinal, (dy, dt, A, C), reset, True, tile, blocks, segments, share)
    noted = tile["EVERY"] // tile["STEPS"] * tile["BLOCK"] * tile["WIDE"]
    notes = _empty(batch * segments, blocks, noted, like=x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    dA = _empty(batch * segments, channels, states, like=x)
    dB, dC = (_empty(blocks, batch, time, states, like=x) for _ in range(2))
    dD = _empty(batch * segments, 0 if D is None else channels, like=x)
    dinitial = _empty(batch, channels, states, like=x)
    launch(
        kernels.backward, (blocks * batch * segments,),
        dy, x, dt, A, B, C, D, reset, kept, end, notes, dx, ddt, dA, dB, dC, dD, dinitial,
        batch * time, time, segments, share, **tile,
    )  # fmt: skip
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dinitial


_op = register(
    "selective_scan", _run, _run_backward,
    outputs=("y", "final", "kept"), gradients=("x", "dt", "A", "B", "C", "D", "initial"), hidden=("kept",),
)  # fmt: skip


def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    A_IN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_I: Tensor | None,
    reset_BT: Tensor | None,
    initial_state_BIN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in x's dtype) and the final state (fp32), differentiable once."""
    # B and C in fp32: a hundredth of x's memory, and no conversion at each of their I readings.
    floats = [t if t is None else t.float().contiguous() for t in (dt_BTI, A_IN, B_BTN, C_BTN, D_I)]
    initial = None if initial_state_BIN is None else initial_state_BIN.float().contiguous()
    reset = None if reset_BT is None else reset_BT.contiguous()
    given = (x_BTI, *floats, initial)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return _op(x_BTI.contiguous(), *floats, reset, initial, keep)[:2]


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""
    half, full = torch.bfloat16, torch.float32

    def call(channels: int, states: int, dtype: torch.dtype, packed: bool) -> None:
        batch, time = 8, 2048
        wide = (batch, time, channels)
        shapes = wide, wide, (channels, states), (batch, time, states), (batch, time, states), (channels,)
        kinds = dtype, full, full, dtype, dtype, full
        x, dt, A, B, C, D = (
            torch.empty(shape, dtype=kind, device="meta", requires_grad=True)
            for shape, kind in zip(shapes, kinds, strict=True)
        )
        reset = torch.empty(batch, time, dtype=torch.bool, device="meta") if packed else None
        results = selective_scan(x, dt, A, B, C, D, reset, None)
        torch.autograd.backward(list(results), [torch.empty_like(t) for t in results])

    cases = [(4096, 16, half, True), (4096, 16, half, False), (1536, 16, full, True)]
    cases += [(2048, states, half, True) for states in (8, 32, 64, 128)]
    return {
        f"I={i} N={n} {str(t)[6:]}{' packed' if p else ''}": lambda i=i, n=n, t=t, p=p: call(i, n, t, p)
        for i, n, t, p in cases
    }
