"""RetNet, RWKV-6 and RWKV-7 written out token by token in fp64, from the papers: a peer that always runs.

Each takes a model's tensors by the names that its files have: those of flash-linear-attention (`fla`), or of
BlinkDL/RWKV-LM (`pth`). Rows are single documents. B batch, T time, D model, H heads, K and V of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def inside(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size))


def rotated(x_BTHK: Tensor, theta: float = 1e4) -> Tensor:
    half = x_BTHK.shape[-1] // 2
    pairs = torch.complex(x_BTHK[..., :half], x_BTHK[..., half:])
    angle = torch.arange(x_BTHK.shape[1])[:, None, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def attention(x: Tensor, w: Weights, spec: dict) -> Tensor:
    size = x.shape[-1] // spec["num_heads"]
    q, k, v = (heads(F.linear(x, w[f"{p}_proj.weight"], w.get(f"{p}_proj.bias")), size) for p in "qkv")
    q, k = (rotated(y, spec.get("rope_theta", 1e4)) for y in (q, k))
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], 2) for y in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(size)
    back = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    seen = (back >= 0) & (back < (spec.get("window_size") or x.shape[1]))
    chances = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", chances, v).flatten(2) @ w["o_proj.weight"].T


def retention(x: Tensor, w: Weights, config: dict) -> Tensor:
    """fla's layer: S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = q_t S_t / sqrt(K)."""
    count = config["num_heads"]
    q, k, v = (heads(x @ w[f"{p}_proj.weight"].T, len(w[f"{p}_proj.weight"]) // count) for p in "qkv")
    q, k = rotated(q) / math.sqrt(q.shape[-1]), rotated(k)
    gamma = 1 - 2.0 ** (-5 - torch.arange(count, dtype=torch.float64))
    state, out = 0.0, []
    for t in range(x.shape[1]):
        state = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((q[:, t, :, :, None] * state).sum(-2))
    weight = next((w[f"{name}.weight"] for name in ("g_norm", "g_norm_swish_gate") if f"{name}.weight" in w), None)
    y = rms(torch.stack(out, 1), weight, config.get("norm_eps", 1e-6)).flatten(2)
    return (y * F.silu(x @ w["g_proj.weight"].T) if "g_proj.weight" in w else y) @ w["o_proj.weight"].T


def before(x: Tensor) -> Tensor:
    """What the token before has more: x_{t-1} - x_t."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1] - x


def time_mix_6(x: Tensor, p: dict, size: int, eps: float) -> Tensor:
    """Equations 15 to 24 of arXiv 2404.05892. `p`: mu, down [R, D] and up [D, R] of each mix, and more."""
    d, mixed = before(x), {}
    for name in "wkvrg":
        low = torch.tanh((x + p["mu"]["x"] * d) @ p["down"][name].T) @ p["up"][name].T
        mixed[name] = x + (p["mu"][name] + low) * d
    r, k, v = (heads(mixed[n] @ p[n].T, size) for n in "rkv")
    w = heads(torch.exp(-torch.exp(p["w0"] + torch.tanh(mixed["w"] @ p["w1"].T) @ p["w2"].T)), size)
    state, out = torch.zeros(1), []
    for t in range(x.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        out.append((r[:, t, :, :, None] * (state + p["u"][:, :, None] * kv)).sum(-2))
        state = w[:, t, :, :, None] * state + kv
    y = normed_heads(torch.stack(out, 1), p["norm"], eps)
    return (y * F.silu(mixed["g"] @ p["g"].T)) @ p["o"].T


def normed_heads(y_BTHV: Tensor, norm: tuple[Tensor, Tensor], eps: float) -> Tensor:
    centred = y_BTHV - y_BTHV.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y.flatten(2) * norm[0] + norm[1]


def channel_mix_6(x: Tensor, p: dict) -> Tensor:
    d = before(x)
    k = torch.relu((x + p["mu_k"] * d) @ p["k"].T).square()
    return torch.sigmoid((x + p["mu_r"] * d) @ p["r"].T) * (k @ p["v"].T)


def time_mix_7(x: Tensor, p: dict, size: int, eps: float, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Section 4 of arXiv 2503.14456; also the values. Low ranks are triples (bias, down [R, D], up [D, R])."""
    d = before(x)
    mixed = {name: x + p["mu"][name] * d for name in "rwkvag"}

    def low(name, inner=lambda h: h):
        bias, down, up = p[name]
        return (0.0 if bias is None else bias) + inner(mixed[name[0]] @ down.T) @ up.T

    r, k, v = (mixed[n] @ p[n].T for n in "rkv")
    if first is not None:
        v = v + (first - v) * torch.sigmoid(low("v_low"))
    decay = torch.exp(-torch.exp(-F.softplus(-low("w_low", torch.tanh)) - 0.5))
    a, g = torch.sigmoid(low("a_low")), low("g_low", torch.sigmoid)
    kk, k = heads(k * p["k_k"], size), k * (1 + (a - 1) * p["k_a"])
    kk = kk / kk.norm(dim=-1, keepdim=True)
    r, k, v_, w, a = (heads(y, size) for y in (r, k, v, decay, a))
    state, out = torch.zeros(1, 1, size, size, dtype=torch.float64), []
    for t in range(x.shape[1]):
        erased = state @ kk[:, t, :, :, None]
        state = state * w[:, t, :, None] - erased * (kk * a)[:, t, :, None] + v_[:, t, :, :, None] * k[:, t, :, None]
        out.append((state @ r[:, t, :, :, None]).squeeze(-1))
    y = normed_heads(torch.stack(out, 1), p["norm"], eps)
    y = y + ((r * k * p["r_k"]).sum(-1, keepdim=True) * v_).flatten(2)
    return (y * g) @ p["o"].T, v


def fla(config: dict, weights: Weights, tokens_BT: Tensor) -> Tensor:
    """The logits of a folder of fla's."""
    w = {name: t.double() for name, t in weights.items()}
    kind, first = config["model_type"], None
    eps = config.get("norm_eps", 1e-6 if kind == "retnet" else 1e-5)
    spec = config.get("attn") or {"layers": []}

    def norm(x, name, w=w):
        return rms(x, w[f"{name}.weight"], eps) if kind == "retnet" else layer_norm(x, w, name, eps)

    x = w["model.embeddings.weight"][tokens_BT]
    if "model.layers.0.pre_norm.weight" in w:
        x = norm(x, "model.layers.0.pre_norm")
    for layer in range(config["num_hidden_layers"]):
        at = inside(w, f"model.layers.{layer}.")
        y, own = norm(x, "attn_norm", at), inside(at, "attn.")
        if layer in spec["layers"]:
            y = attention(y, own, spec)
        elif kind == "retnet":
            y = retention(y, own, config)
        elif kind == "rwkv6":
            y = time_mix_6(y, _fla_6(own), own["bonus"].shape[1], eps)
        else:
            size = own["r_k"].shape[1]
            y, values = time_mix_7(y, _fla_7(own), size, size * eps, first)
            first = values if first is None else first
        x = x + y
        if kind == "retnet":
            y, mlp = norm(x, "mlp_norm", at), inside(at, "mlp.")
            y = F.silu(y @ mlp["gate_proj.weight"].T) * (y @ mlp["up_proj.weight"].T) @ mlp["down_proj.weight"].T
        else:
            y, ffn = norm(x, "ffn_norm", at), inside(at, "ffn.")
            y = channel_mix_6(y, _fla_ffn_6(ffn)) if kind == "rwkv6" else channel_mix_7(y, ffn["x_k"], ffn)
        x = x + y
    head = w["model.embeddings.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    return norm(x, "model.norm") @ head.T


def channel_mix_7(x: Tensor, mu: Tensor, w: Weights) -> Tensor:
    return torch.relu((x + mu * before(x)) @ w["key.weight"].T).square() @ w["value.weight"].T


def pth(weights: Weights, tokens_BT: Tensor) -> Tensor:
    """The logits of a .pth of BlinkDL's, RWKV-6 or 7."""
    w = {name: t.double() for name, t in weights.items()}
    x, first = layer_norm(w["emb.weight"][tokens_BT], w, "blocks.0.ln0", 1e-5), None
    for layer in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        at = inside(w, f"blocks.{layer}.")
        y, att, ffn = layer_norm(x, at, "ln1", 1e-5), inside(at, "att."), inside(at, "ffn.")
        if "time_faaaa" in att:
            y = time_mix_6(y, _pth_6(att), att["time_faaaa"].shape[1], 64e-5)
        else:
            y, values = time_mix_7(y, _pth_7(att), att["r_k"].shape[1], 64e-5, first)
            first = values if first is None else first
        x = x + y
        y = layer_norm(x, at, "ln2", 1e-5)
        if "time_maa_r" in ffn:
            own = {"mu_k": ffn["time_maa_k"], "mu_r": ffn["time_maa_r"]}
            y = channel_mix_6(y, own | {n[0]: ffn[f"{n}.weight"] for n in ("key", "value", "receptance")})
        else:
            y = channel_mix_7(y, ffn["x_k"], ffn)
        x = x + y
    return layer_norm(x, w, "ln_out", 1e-5) @ w["head.weight"].T


def _fla_6(w: Weights) -> dict:
    order = "rwkvg"
    downs = w["x_proj.0.linear.weight"].chunk(5)
    ups = w["x_proj.2.weight"].unflatten(1, (5, -1)).unbind(1)
    lora = inside(w, "w_proj.linear.lora.")
    return {
        "mu": dict(zip(order, w["x_bias"], strict=True)) | {"x": w["x_proj.0.mu"]},
        "down": dict(zip(order, downs, strict=True)),
        "up": dict(zip(order, ups, strict=True)),
        **{n: w[f"{n}_proj.linear.weight"] for n in "rkvg"},
        **{"w0": lora["2.bias"], "w1": lora["0.weight"], "w2": lora["2.weight"], "u": w["bonus"]},
        "norm": (w["g_norm.weight"], w["g_norm.bias"]),
        "o": w["o_proj.weight"],
    }


def _fla_ffn_6(w: Weights) -> dict:
    return {
        **{"mu_k": w["key.mu"], "mu_r": w["receptance.mu"], "v": w["value.weight"]},
        **{"k": w["key.linear.weight"], "r": w["receptance.linear.weight"]},
    }


def _fla_7(w: Weights) -> dict:
    ends = ("2.bias", "0.weight", "2.weight")
    return {
        "mu": {n: w[f"x_{n}"].flatten() for n in "rwkvag"},
        **{n: w[f"{n}_proj.weight"] for n in "rkvo"},
        **{f"{n}_low": tuple(w.get(f"{n}_lora.lora.{end}") for end in ends) for n in "wavg"},
        **{n: w[n] for n in ("k_k", "k_a", "r_k")},
        "norm": (w["g_norm.weight"], w["g_norm.bias"]),
    }


def _pth_6(w: Weights) -> dict:
    order = "wkvrg"
    return {
        "mu": {n: w[f"time_maa_{n}"] for n in (*order, "x")},
        "down": {n: m.T for n, m in zip(order, w["time_maa_w1"].chunk(5, 1), strict=True)},
        "up": {n: m.T for n, m in zip(order, w["time_maa_w2"], strict=True)},
        **{n[0]: w[f"{n}.weight"] for n in ("receptance", "key", "value", "gate", "output")},
        **{"w0": w["time_decay"], "w1": w["time_decay_w1"].T, "w2": w["time_decay_w2"].T, "u": w["time_faaaa"]},
        "norm": (w["ln_x.weight"], w["ln_x.bias"]),
    }


def _pth_7(w: Weights) -> dict:
    def low(n):
        return (w.get(f"{n}0"), w[f"{n}1"].T, w[f"{n}2"].T) if f"{n}1" in w else None

    return {
        "mu": {n: w[f"x_{n}"] for n in "rwkvag"},
        **{n[0]: w[f"{n}.weight"] for n in ("receptance", "key", "value", "output")},
        **{f"{n}_low": low(n) for n in "wavg"},
        **{n: w[n] for n in ("k_k", "k_a", "r_k")},
        "norm": (w["ln_x.weight"], w["ln_x.bias"]),
    }
