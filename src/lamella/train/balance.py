"""What the routers keep from one step to the next: the last step's loads, and the bias that evens loads out.

Both follow from the loads of the whole step, which every process is told; so every process keeps those of all layers,
sets its own routers by them, and they are the same under every layout.
"""

import torch
from torch import Tensor, nn

from lamella.channels.moe import Config
from lamella.channels.moe.router import Router
from lamella.config import ModelConfig
from lamella.model.stack import plan_layers


class Balance:
    """`state` is plain numbers by layer, for checkpoints: {layer: {"load": shares of the slots, "bias": ...}}."""

    def __init__(self, config: ModelConfig, model: nn.Module):
        self.routers = {m.place: m for m in model.modules() if isinstance(m, Router)}
        self.rates: dict[str, float] = {}
        self.state: dict[str, dict[str, list[float]]] = {}
        for plan in plan_layers(config):
            if isinstance(plan.channel, Config):
                place, zeros = f"layer{plan.index}/channel", [0.0] * plan.channel.num_experts
                self.rates[place] = plan.channel.bias_rate
                self.state[place] = {"load": zeros, "bias": zeros}

    def update(self, totals: dict[str, Tensor]) -> None:
        """After a step, from its recorded sums: the bias of an expert with more than its share falls by the rate, of
        one with less it rises (Wang et al. 2024, arXiv 2408.15664, algorithm 1).
        """
        for place, rate in self.rates.items():
            load = totals[f"{place}/load"].double()
            away = (load.mean() - load).sign()
            bias = torch.tensor(self.state[place]["bias"], dtype=torch.float64) + rate * away
            share = load / load.sum().clamp(min=1)
            self.restore({place: {"load": share.tolist(), "bias": bias.tolist()}})

    def restore(self, state: dict[str, dict[str, list[float]]]) -> None:
        """Takes over a state, as a checkpoint has it, and sets this process's routers."""
        self.state |= state
        for place, router in self.routers.items():
            router.load_E.copy_(torch.tensor(self.state[place]["load"]))
            router.bias_E.copy_(torch.tensor(self.state[place]["bias"]))
