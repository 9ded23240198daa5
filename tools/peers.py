"""Jamba, Llama and Mixtral of transformers as peers of ours: the same shape, and the same weights name by name."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers

# Our name -> theirs, several where ours is their concatenation; inside a layer.
MAMBA = {
    **{name: (name,) for name in ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")},
    "out_proj.weight": ("out_proj.weight",),
    "conv.weight": ("conv1d.weight",),
    "conv.bias": ("conv1d.bias",),
    "dt_norm.weight": ("dt_layernorm.weight",),
    "B_norm.weight": ("b_layernorm.weight",),
    "C_norm.weight": ("c_layernorm.weight",),
}
ATTENTION = {
    "qkv.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "out.weight": ("o_proj.weight",),
}
MLP = {"w_in.weight": ("gate_proj.weight", "up_proj.weight"), "w_out.weight": ("down_proj.weight",)}
MOE = {
    "experts.w_in": ("experts.gate_up_proj",),
    "experts.w_out": ("experts.down_proj",),
}


@dataclasses.dataclass(frozen=True)
class Words:
    """What a family calls what all of them have."""

    norm: str
    channel: str
    channel_norm: str
    router: str


JAMBA = Words("final_layernorm", "feed_forward", "pre_ff_layernorm", "router")
LLAMA = Words("norm", "mlp", "post_attention_layernorm", "gate")  # Mixtral's too


def names(model: LanguageModel, words: Words) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each parameter of ours with the transformers parameters whose concatenation it is."""
    yield "embedding.weight", ("model.embed_tokens.weight",)
    yield "norm.weight", (f"model.{words.norm}.weight",)
    yield "head.weight", ("lm_head.weight",)
    parts = {"mamba": (MAMBA, "mamba"), "attention": (ATTENTION, "self_attn")}
    channels = {"mlp": MLP, "moe": MOE | {"router.weight": (f"{words.router}.weight",)}}
    for plan in plan_layers(model.config):
        assert plan.mixer is not None and plan.channel is not None
        table, folder = parts[plan.mixer.mixer]
        ours, their = f"layers.{plan.index}", f"model.layers.{plan.index}"
        branches = (("mixer", table, folder), ("channel", channels[plan.channel.channel], words.channel))
        for branch, rows, where in branches:
            for name, theirs in rows.items():
                yield f"{ours}.{branch}.{name}", tuple(f"{their}.{where}.{t}" for t in theirs)
        yield f"{ours}.mixer_norm.weight", (f"{their}.input_layernorm.weight",)
        yield f"{ours}.channel_norm.weight", (f"{their}.{words.channel_norm}.weight",)


def gathered(tensors: dict[str, Tensor], parts: tuple[str, ...], shape: torch.Size) -> Tensor:
    """Theirs in our layout; the depthwise kernel loses its dim of one."""
    return torch.cat([tensors[part] for part in parts]).view(shape)


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: LanguageModel, words: Words = JAMBA) -> dict[str, tuple[str, ...]]:
    """Gives ours the weights of a ...ForCausalLM of the same shape. Returns the table of names."""
    parameters = dict(theirs.named_parameters())
    table = dict(names(ours, words))
    assert set(table) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        parameter.copy_(gathered(parameters, table[name], parameter.shape))  # type: ignore[arg-type]
    assert sorted(p for parts in table.values() for p in parts) == sorted(parameters)  # each has one place in ours
    return table
