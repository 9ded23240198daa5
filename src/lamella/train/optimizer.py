"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with the right set undecayed, and the learning rate of a step."""

import math

import torch
from torch import nn
from torch.optim import AdamW

from lamella.config import OptimizerConfig, ScheduleConfig
from lamella.nn.shard import placed_parameters


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms, biases, A_log, D and other vectors do not (each parameter's place says so)."""
    decayed = [p for _, p in placed_parameters(model) if p.place.decay]
    others = [p for _, p in placed_parameters(model) if not p.place.decay]
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": others, "weight_decay": 0.0, "name": "no_decay"},
    ]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of step 0, 1, ... of `steps`: linear warm-up to `peak`, then the schedule's course to its minimum."""
    low = peak * schedule.min_lr_ratio
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":  # stable, then linear over the last `decay_steps` (Hu et al. 2024, arXiv 2404.06395)
        start, span = steps - schedule.decay_steps, schedule.decay_steps
        return peak if step < start else peak + (low - peak) * (step - start + 1) / span
    done = (step - schedule.warmup_steps + 1) / max(1, steps - schedule.warmup_steps)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
