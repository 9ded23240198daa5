"""Whole training steps on a GPU: tokens/s and MFU of a model on the kernels, in plain torch, and by transformers.

    python -m tools.bench_step [--model jamba-1b] [--length 4096] [--rows 4] [--rounds 10] [--json]

Forward, backward and AdamW under ZeRO 1 in bf16, one process, rows of one document, random tokens, one micro-batch a
row. The sides take turns, medians of the rounds. MFU counts the operations of the model (`lamella.model.count`, nothing
that is computed twice) over a matmul of 8,192 measured here, and over the nominal rate where the GPU is known.
transformers' Jamba has the same shape and torch's AdamW with bf16 parameters, less than our fp32 masters; without
mamba_ssm it scans in plain torch. --tiny is a small model on any machine, which shows that all sides run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.config import RunConfig, load_run
from lamella.model.count import count
from lamella.model.stack import plan_layers
from lamella.nn.record import Record
from lamella.parallel import mesh as meshes
from lamella.parallel.apply import build_model, make_passes
from lamella.parallel.layout import resolve
from lamella.parallel.seat import find_seat
from lamella.parallel.zero import Zero
from lamella.train.clock import Clock
from lamella.train.feed import Feed
from lamella.train.loss import make_loss
from lamella.train.optimizer import make_optimizer
from lamella.train.step import accumulate_gradients
from lamella_kernels import forms
from tools.bench_kernels import ceilings, once
from tools.bench_memory import FullRows

RUN = Path("configs/run/quickstart.yaml")
NOMINAL = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense bf16, the makers' data sheets
SIDES = ("kernels", "torch", "transformers")
TINY = ["model=jamba-nano", "model.d_model=32", "model.vocab_size=512", "train.sequence_length=64"]


class Ours:
    """One step of the trainer's own."""

    def __init__(self, run: RunConfig):
        seat = find_seat()
        self.mesh = meshes.join(seat, resolve(run, seat.world))
        model = build_model(run.model, self.mesh, run.train.precision, run.train.seed)
        optimizer = run.train.optimizer
        self.zero = Zero(model, make_optimizer(model, optimizer), optimizer.clip_norm, self.mesh)
        self.passes = make_passes(model, self.zero, make_loss(), self.mesh, run.train.sequence_length)
        rows = FullRows(run.model.vocab_size, run.train.sequence_length, run.train.global_batch_size)
        self.feed = Feed(rows, self.mesh)

    def step(self) -> None:
        accumulate_gradients(self.passes, self.feed, self.mesh, 0, 0, Record(), Clock(self.mesh.device))
        self.zero.step(1e-5)

    def as_form(self, form: forms.Form) -> Callable[[], None]:
        def step() -> None:
            with forms.use(form):
                self.step()

        return step


def theirs(run: RunConfig, device: torch.device) -> Callable[[], None]:
    """transformers' Jamba of the same shape."""
    import transformers

    model, plans = run.model, plan_layers(run.model)
    parts: Any = {next(iter(p.values())): p for p in model.parts.values()}
    mamba, attention, moe = parts["mamba"], parts["attention"], parts["moe"]
    config = transformers.JambaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=moe["d_ff"],
        num_hidden_layers=len(plans),
        num_attention_heads=attention["num_heads"],
        num_key_value_heads=attention.get("num_kv_heads") or attention["num_heads"],
        num_experts=moe["num_experts"],
        num_experts_per_tok=moe.get("top_k", 2),
        mamba_d_state=mamba.get("d_state", 16),
        mamba_dt_rank=mamba.get("dt_rank", "auto"),
    )
    with torch.device(device):
        jamba = transformers.JambaForCausalLM(config).bfloat16()
    optimizer = torch.optim.AdamW(jamba.parameters(), lr=1e-5)
    size, length = run.train.global_batch_size, run.train.sequence_length
    tokens = torch.randint(model.vocab_size, (size, length + 1), device=device)

    def step() -> None:
        for row in tokens.split(1):
            logits: Tensor = jamba(row[:, :-1], use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1).float(), row[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> int:
    what = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.bench_step", description=what)
    parser.add_argument("--model", default="jamba-1b", help="of configs/model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:2])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available() and not given.tiny:
        print("bench_step: no CUDA here; --tiny shows that it runs", file=sys.stderr)
        return 2
    words = TINY if given.tiny else [f"model={given.model}", f"train.sequence_length={given.length}"]
    words += [f"train.global_batch_size={given.rows}", "train.precision=bf16", "layout.micro_batch=1"]
    run = load_run(RUN, words)
    ours = Ours(run)
    device = ours.mesh.device
    sides: dict[str, Callable[[], None]] = {"torch": ours.as_form("eager")}
    if forms.HAS_TRITON and device.type == "cuda":
        sides["kernels"] = ours.as_form("gpu")
    if "transformers" in given.sides:
        sides["transformers"] = theirs(run, device)
    sides = {name: sides[name] for name in given.sides if name in sides}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    for round_ in range(given.rounds + 2):  # two warm up
        for name, step in sides.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = once(step)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device) / 2**30
            if round_ > 1:
                taken[name].append(seconds)
    length, counted = run.train.sequence_length, count(run.model, run.train.sequence_length)
    ceiling = 1e12 * ceilings(device)["matmul_tflop_s"] if device.type == "cuda" else float("nan")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    nominal = next((rate for word, rate in NOMINAL.items() if word in gpu), float("nan"))
    for name, seconds in taken.items():
        second = statistics.median(seconds)
        work = counted.training_flops * given.rows / second
        line = {
            "side": name,
            "device": gpu,
            "parameters": counted.parameters,
            "active": counted.active,
            "tokens_per_second": given.rows * length / second,
            "spread": [given.rows * length / max(seconds), given.rows * length / min(seconds)],
            "mfu_nominal": work / nominal,
            "mfu_measured": work / ceiling,
            "peak_gib": peaks.get(name),
        }
        if given.json:
            print(json.dumps(line))
        else:
            print(f"{name:14}{line['tokens_per_second']:12,.0f} tokens/s   MFU {line['mfu_nominal']:.1%} of nominal,"
                  f" {line['mfu_measured']:.1%} of the measured matmul   {line['peak_gib'] or 0:.1f} GiB")
    ours.feed.close()
    meshes.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
