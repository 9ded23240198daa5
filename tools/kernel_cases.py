"""What tools/bench_kernels.py runs: sizes of a hybrid of about a billion parameters, and who else computes the same.

A peer is made by a function that imports it, so that one that is not installed is left out. Bytes are what an operator
must read and write at least, each tensor once, in forward; `backward` says how many times as many forward and backward
take together, of bytes and of operations.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lamella_kernels as kernels

D, HEADS, HEAD = 2048, 32, 64  # the stream, attention
INNER, STATES = 4096, 16  # Mamba
SSD_HEADS, SSD_STATES = 64, 128  # Mamba-2, heads of 64 channels
RETENTION = (8, 256, 512)  # RetNet: heads, their keys and values
GATED = (16, 128, 128)  # linear attention whose decays vary
WIDTH = 5632  # of the feed-forward layer
EXPERTS, CHOICES, EXPERT = 8, 2, 2816  # of the mixture of experts: how many, a token's, the width of one
HALF = 2  # bytes of a bf16
Inputs = dict[str, Tensor]
Sizes = Callable[[int], float]


@dataclass(frozen=True)
class Case:
    """`inputs(rows, length, device)` are the arguments of `ours` and of what each of `peers` returns."""

    name: str
    ours: Callable[..., Any]
    inputs: Callable[[int, int, torch.device], Inputs]
    bytes: Sizes = lambda tokens: 0.0
    flops: Sizes = lambda tokens: 0.0
    backward: tuple[float, float] = (3, 3)
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)


def made(device: torch.device, **shapes: tuple[int, ...]) -> Inputs:
    """bf16, with gradients."""
    random = torch.Generator(device).manual_seed(0)
    return {
        name: torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16).requires_grad_()
        for name, shape in shapes.items()
    }


def norm_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    return made(device, x=(rows * length, D), weight_D=(D,))


def added_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    return made(device, x=(rows * length, D), weight_D=(D,), residual=(rows * length, D))


def gated_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    return made(device, x=(rows * length, INNER), weight_D=(INNER,), gate=(rows * length, INNER))


def swiglu_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    return made(device, gate=(rows * length, WIDTH), up=(rows * length, WIDTH))


def rotary_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    found = made(device, x_BTHK=(rows, length, HEADS, HEAD))
    return found | {"position_BT": torch.arange(length, device=device).expand(rows, -1).contiguous()}


def conv_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    return made(device, x_BTI=(rows, length, INNER), weight_IK=(INNER, 4), bias_I=(INNER,))


def scan_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    found = made(device, x_BTI=(rows, length, INNER), B_BTN=(rows, length, STATES), C_BTN=(rows, length, STATES))
    dt = F.softplus(torch.randn(rows, length, INNER, device=device) - 4).requires_grad_()
    decay = -torch.arange(1, STATES + 1, device=device).float().expand(INNER, -1).contiguous()
    return found | {
        "dt_BTI": dt,
        "A_IN": decay.requires_grad_(),
        "D_I": torch.ones(INNER, device=device).requires_grad_(),
    }


def ssd_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    states = (rows, length, 1, SSD_STATES)
    found = made(device, x_BTHP=(rows, length, SSD_HEADS, HEAD), B_BTGN=states, C_BTGN=states)
    dt = F.softplus(torch.randn(rows, length, SSD_HEADS, device=device) - 4).requires_grad_()
    decay = -torch.arange(1, SSD_HEADS + 1, device=device).float()
    return found | {
        "dt_BTH": dt,
        "A_H": decay.requires_grad_(),
        "D_H": torch.ones(SSD_HEADS, device=device).requires_grad_(),
    }


def routed(rows: int, length: int, device: torch.device) -> Inputs:
    """Every slot filled, some experts with more tokens than others."""
    tokens = rows * length
    random = torch.Generator(device).manual_seed(1)
    liking = torch.linspace(0, 1, EXPERTS, device=device)
    score = liking + torch.rand(tokens, EXPERTS, generator=random, device=device)
    expert, slot = score.topk(CHOICES).indices.flatten().sort(stable=True)
    place = torch.empty_like(slot).scatter_(0, slot, torch.arange(len(slot), device=device))
    counts = torch.bincount(expert, minlength=EXPERTS)
    return {"slot_M": slot, "place_NS": place.view(tokens, CHOICES), "counts": counts}


def experts_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    counts = routed(rows, length, device)["counts"]
    return made(device, x_ND=(CHOICES * rows * length, D), weight_EFD=(EXPERTS, EXPERT, D)) | {"counts": counts}


def permute_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    index = routed(rows, length, device)
    del index["counts"]
    return made(device, x_ND=(rows * length, D)) | index


def unpermute_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    index = permute_inputs(rows, length, device)
    del index["x_ND"]
    weight = torch.rand(rows * length, CHOICES, device=device).requires_grad_()
    return made(device, y_MD=(CHOICES * rows * length, D)) | {"weight_NS": weight} | index


def retention_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    """The paper's decays, 1 - 2^(-5 - head); queries are not scaled."""
    heads, keys, values = RETENTION
    found = heads_inputs(rows, length, device, heads, keys, values)
    return found | {"log_decay": torch.log1p(-(2.0 ** (-5 - torch.arange(heads, device=device).float())))}


def gated_heads_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    found = heads_inputs(rows, length, device, *GATED)
    return found | {"log_decay": F.logsigmoid(torch.randn(rows, length, GATED[0], device=device) + 4).requires_grad_()}


def heads_inputs(rows: int, length: int, device: torch.device, heads: int, keys: int, values: int) -> Inputs:
    shape = (rows, length, heads)
    return made(device, q_BTHK=(*shape, keys), k_BTHK=(*shape, keys), v_BTHV=(*shape, values))


def wkv6_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    tokens = (rows, length, HEADS, HEAD)
    found = made(device, r_BTHK=tokens, k_BTHK=tokens, v_BTHV=tokens)
    log_w = -(torch.randn(tokens, device=device) - 2).exp()
    return found | {
        "log_w_BTHK": log_w.requires_grad_(),
        "u_HK": torch.randn(HEADS, HEAD, device=device).requires_grad_(),
    }


def wkv7_inputs(rows: int, length: int, device: torch.device) -> Inputs:
    """a and b as RWKV-7 has them, its decays between exp(-exp(-0.5)) and 1."""
    tokens = (rows, length, HEADS, HEAD)
    found = made(device, r_BTHK=tokens, k_BTHK=tokens, v_BTHV=tokens)
    kk = F.normalize(torch.randn(tokens, device=device), dim=-1)
    rate = torch.sigmoid(torch.randn(tokens, device=device))
    return found | {
        "log_w_BTHK": (-0.6065 * torch.sigmoid(torch.randn(tokens, device=device))).requires_grad_(),
        "a_BTHK": (-kk).bfloat16().requires_grad_(),
        "b_BTHK": (kk * rate).bfloat16().requires_grad_(),
    }


def ours_norm(**inputs: Any) -> Any:
    return kernels.rmsnorm(**inputs, eps=1e-6)


def ours_rotary(**inputs: Any) -> Any:
    return kernels.rotary(**inputs, theta=10000.0)


def ours_conv(**inputs: Any) -> Any:
    return kernels.causal_conv1d(**inputs, activation="silu")


def ours_normalized(**inputs: Any) -> Any:
    return kernels.linear_attention(**inputs, normalize=True)


def torch_norm() -> Callable[..., Tensor]:
    return torch.compile(lambda x, weight_D: F.rms_norm(x, (D,), weight_D, 1e-6))


def torch_added() -> Callable[..., Any]:
    def both(x: Tensor, weight_D: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        added = x + residual
        return F.rms_norm(added, (D,), weight_D, 1e-6), added

    return torch.compile(both)


def torch_gated() -> Callable[..., Tensor]:
    return torch.compile(lambda x, weight_D, gate: F.rms_norm(x * F.silu(gate), (INNER,), weight_D, 1e-6))


def torch_swiglu() -> Callable[..., Tensor]:
    return torch.compile(lambda gate, up: F.silu(gate) * up)


def torch_conv() -> Callable[..., Tensor]:
    def conv(x_BTI: Tensor, weight_IK: Tensor, bias_I: Tensor) -> Tensor:
        y = F.conv1d(x_BTI.transpose(1, 2), weight_IK[:, None], bias_I, padding=3, groups=INNER)
        return F.silu(y[..., : x_BTI.shape[1]]).transpose(1, 2)

    return torch.compile(conv)


def liger_norm() -> Callable[..., Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found]

    return lambda x, weight_D: LigerRMSNormFunction.apply(x, weight_D, 1e-6)


def liger_swiglu() -> Callable[..., Tensor]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def fla_conv() -> Callable[..., Any]:
    from fla.modules.convolution import causal_conv1d  # type: ignore[import-not-found]

    return lambda x_BTI, weight_IK, bias_I: causal_conv1d(x_BTI, weight_IK, bias_I, activation="silu")


def fla_wkv6() -> Callable[..., Any]:
    from fla.ops.rwkv6 import chunk_rwkv6  # type: ignore[import-not-found]

    def chunked(r_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_w_BTHK: Tensor, u_HK: Tensor) -> Tensor:
        return chunk_rwkv6(r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, u_HK, scale=1.0)[0]

    return chunked


def fla_wkv7() -> Callable[..., Any]:
    from fla.ops.rwkv7 import chunk_rwkv7  # type: ignore[import-not-found]

    def chunked(
        r_BTHK: Tensor, log_w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, a_BTHK: Tensor, b_BTHK: Tensor
    ) -> Tensor:
        return chunk_rwkv7(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, scale=1.0)[0]

    return chunked


def mamba_scan() -> Callable[..., Any]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore[import-not-found]

    def scan(x_BTI: Tensor, dt_BTI: Tensor, A_IN: Tensor, B_BTN: Tensor, C_BTN: Tensor, D_I: Tensor) -> Tensor:
        x, dt, b, c = (t.transpose(1, 2) for t in (x_BTI, dt_BTI.to(x_BTI.dtype), B_BTN, C_BTN))
        return selective_scan_fn(x, dt, A_IN, b, c, D_I)

    return scan


def mamba_ssd() -> Callable[..., Any]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    def ssd(x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor) -> Tensor:
        return mamba_chunk_scan_combined(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, 256, D=D_H)

    return ssd


def fla_retention() -> Callable[..., Any]:
    from fla.ops.retention import chunk_retention  # type: ignore[import-not-found]

    return lambda q_BTHK, k_BTHK, v_BTHV, log_decay: chunk_retention(q_BTHK, k_BTHK, v_BTHV, scale=1.0)


def fla_simple_gla() -> Callable[..., Any]:
    from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]

    return lambda q_BTHK, k_BTHK, v_BTHV, log_decay: chunk_simple_gla(q_BTHK, k_BTHK, v_BTHV, log_decay, scale=1.0)


def torch_grouped() -> Callable[..., Tensor]:
    def multiply(x_ND: Tensor, weight_EFD: Tensor, counts: Tensor) -> Tensor:
        return F.grouped_mm(x_ND, weight_EFD.mT, offs=counts.cumsum(0, dtype=torch.int32))

    return multiply


def dense() -> Callable[..., Tensor]:
    """As many operations with one weight."""
    return lambda x_ND, weight_EFD, counts: F.linear(x_ND, weight_EFD[0])


def ssd_flops(tokens: int, chunk: int = 64) -> float:
    """Within chunks C B^T and its product with x, then states in and out (Dao & Gu 2024, section 6)."""
    inside = chunk * (SSD_STATES + SSD_HEADS * HEAD)
    return 2.0 * tokens * (inside + 2 * SSD_HEADS * HEAD * SSD_STATES)


def heads_flops(heads: int, keys: int, values: int, chunk: int = 64) -> Sizes:
    """Scores and their product with the values within chunks, then states in and out."""
    return lambda tokens: 2.0 * tokens * heads * (chunk * (keys + values) + 2 * keys * values)


CASES = (
    Case(
        "rmsnorm",
        ours_norm,
        norm_inputs,
        bytes=lambda n: 2.0 * HALF * D * n,
        backward=(2.5, 0),
        peers={"compiled": torch_norm, "liger": liger_norm},
    ),
    Case(
        "rmsnorm, added",
        ours_norm,
        added_inputs,
        bytes=lambda n: 4.0 * HALF * D * n,
        backward=(2, 0),
        peers={"compiled": torch_added},
    ),
    Case(
        "rmsnorm, gated",
        ours_norm,
        gated_inputs,
        bytes=lambda n: 3.0 * HALF * INNER * n,
        backward=(8 / 3, 0),
        peers={"compiled": torch_gated},
    ),
    Case(
        "swiglu",
        kernels.swiglu,
        swiglu_inputs,
        bytes=lambda n: 3.0 * HALF * WIDTH * n,
        backward=(8 / 3, 0),
        peers={"compiled": torch_swiglu, "liger": liger_swiglu},
    ),
    Case("rotary", ours_rotary, rotary_inputs, bytes=lambda n: 2.0 * HALF * HEADS * HEAD * n, backward=(2, 0)),
    Case(
        "causal_conv1d",
        ours_conv,
        conv_inputs,
        bytes=lambda n: 2.0 * HALF * INNER * n,
        backward=(2.5, 0),
        peers={"compiled": torch_conv, "fla": fla_conv},
    ),
    Case(
        "selective_scan",
        kernels.selective_scan,
        scan_inputs,
        bytes=lambda n: (2.0 * HALF + 4) * INNER * n,
        backward=(3, 0),
        peers={"mamba_ssm": mamba_scan},
    ),
    Case(
        "grouped_gemm",
        kernels.grouped_gemm,
        experts_inputs,
        flops=lambda n: 2.0 * CHOICES * n * D * EXPERT,
        peers={"grouped_mm": torch_grouped, "dense": dense},
    ),
    Case(
        "moe_permute",
        kernels.moe_permute,
        permute_inputs,
        bytes=lambda n: (1.0 + CHOICES) * HALF * D * n,
        backward=(2, 0),
    ),
    Case(
        "moe_unpermute",
        kernels.moe_unpermute,
        unpermute_inputs,
        bytes=lambda n: (1.0 + CHOICES) * HALF * D * n,
        backward=((2 + 3 * CHOICES) / (1 + CHOICES), 0),
    ),
    Case("ssd", kernels.ssd, ssd_inputs, flops=ssd_flops, backward=(0, 3.5), peers={"mamba_ssm": mamba_ssd}),
    Case(
        "retention",
        kernels.linear_attention,
        retention_inputs,
        flops=heads_flops(*RETENTION),
        backward=(0, 3.1),
        peers={"fla": fla_retention},
    ),
    Case(
        "retention, normalised",
        ours_normalized,
        retention_inputs,
        flops=heads_flops(*RETENTION),
        backward=(0, 3.1),
    ),
    Case(
        "linear_attention",
        kernels.linear_attention,
        gated_heads_inputs,
        flops=heads_flops(*GATED),
        backward=(0, 3.1),
        peers={"fla": fla_simple_gla},
    ),
    Case(
        "wkv6",
        kernels.wkv6,
        wkv6_inputs,
        bytes=lambda n: (4.0 * HALF + 4) * HEADS * HEAD * n,
        backward=(34 / 12, 0),
        peers={"fla": fla_wkv6},
    ),
    Case(
        "wkv7",
        kernels.wkv7,
        wkv7_inputs,
        bytes=lambda n: (6.0 * HALF + 4) * HEADS * HEAD * n,
        backward=(46 / 16, 0),
        peers={"fla": fla_wkv7},
    ),
)
