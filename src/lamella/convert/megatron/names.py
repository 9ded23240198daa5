"""How megatron-core 0.16 names its tensors, in a distributed checkpoint and in its modules: tables as a family's.

A checkpoint has several forms of the same model (`Storage`). Its names of norms are Transformer Engine's, whose linear
layers hold the norm before them, whatever computed the model.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal

from lamella.channels import mlp, moe
from lamella.config import ModelConfig
from lamella.convert.map import Row, Table, grouped, kernel
from lamella.mixers import attention, mamba2
from lamella.model.stack import LayerPlan, plan_layers

Experts = Literal["stacked", "numbered", "modules", "gemms"]
EXPERTS: dict[Experts, str] = {
    "stacked": "experts.experts.{part}.weight",
    "numbered": "experts.experts.{{expert}}.{part}.weight",
    "modules": "experts.local_experts.{{expert}}.{part}.weight",  # as modules: SequentialMLP
    "gemms": "experts.{part}.weight{{expert}}",  # as modules: TEGroupedMLP
}
TOLD_BY: dict[Experts, str] = {
    "numbered": r"\.experts\.experts\.\d",
    "modules": r"\.local_experts\.\d",
    "gemms": r"\.experts\.linear_fc\d\.weight\d",
}
SPLITS = {"in_proj.weight": "z x B C dt", "conv1d.weight": "x B C", "conv1d.bias": "x B C"}


@dataclasses.dataclass(frozen=True)
class Storage:
    """`stacked`: one tensor for all layers. `halves`: gate and up are two tensors. `split`: so are Mamba's segments.

    `norms`: where the norm before a branch is: in the linear layer behind it ("inside"), in it but before experts
    ("mixed"), or a module ("modules").
    """

    stacked: bool = False
    experts: Experts = "stacked"
    halves: bool = False
    split: bool = True
    norms: Literal["inside", "mixed", "modules"] = "mixed"


def storage_of(names: Iterable[str]) -> Storage:
    """The form of a checkpoint, by the names that it has."""
    names = list(names)
    numbered = any(re.match(r"decoder\.layers\.\d+\.", name) for name in names)
    told: list[Experts] = [form for form, by in TOLD_BY.items() if any(re.search(by, name) for name in names)]
    inside = any(re.search(r"\.linear_(qkv|fc1)\.layer_norm_weight$|in_proj\.layer_norm_weight$", n) for n in names)
    mixed = any(name.endswith(".pre_mlp_layernorm.weight") for name in names)
    return Storage(
        stacked=not numbered,
        experts=told[0] if told else "stacked",
        halves=any(name.endswith("linear_fc1.weight_w") for name in names),
        split=any(name.endswith("in_proj.weight.z") for name in names),
        norms="modules" if not inside else "mixed" if mixed else "inside",
    )


def table(form: Storage, hybrid: bool) -> Table:
    """Our names -> theirs. `{mixer}` and `{channel}` are the numbers of their layers, as `numbers` gives them."""
    at = "[layer]" if form.stacked else ".{{{branch}}}"
    mixer, channel = (f"decoder.layers{at.format(branch=branch)}" for branch in ("mixer", "channel"))
    ours, theirs = "layers.{layer}", f"{mixer}.mixer"
    experts = {part: EXPERTS[form.experts].format(part=f"linear_{part}") for part in ("fc1", "fc2")}
    rows: dict[str, Row] = {
        "embedding.weight": "embedding.word_embeddings.weight",
        "norm.{rest}": "decoder.final_norm.{rest}" if hybrid else "decoder.final_layernorm.{rest}",
        "head.weight": "output_layer.weight",
        f"{ours}.mixer_norm.{{rest}}": f"{mixer}.{{mixer_norm}}{{rest}}",
        f"{ours}.channel_norm.{{rest}}": f"{channel}.{{channel_norm}}{{rest}}",
        f"{ours}.mixer.qkv.{{rest}}": grouped(f"{mixer}.self_attention.linear_qkv.{{rest}}"),
        f"{ours}.mixer.out.{{rest}}": f"{mixer}.self_attention.linear_proj.{{rest}}",
        f"{ours}.mixer.q_norm.{{rest}}": f"{mixer}.self_attention.q_layernorm.{{rest}}",
        f"{ours}.mixer.k_norm.{{rest}}": f"{mixer}.self_attention.k_layernorm.{{rest}}",
        f"{ours}.mixer.conv.weight": _split(form, f"{theirs}.conv1d.weight"),
        f"{ours}.mixer.conv.bias": _split(form, f"{theirs}.conv1d.bias"),
        f"{ours}.mixer.in_proj.weight": _split(form, f"{theirs}.in_proj.weight"),
        f"{ours}.mixer.{{rest}}": f"{theirs}.{{rest}}",
        f"{ours}.channel.w_in.{{rest}}": _halves(form, f"{channel}.mlp.linear_fc1.{{rest}}"),
        f"{ours}.channel.w_out.{{rest}}": f"{channel}.mlp.linear_fc2.{{rest}}",
        f"{ours}.channel.router.weight": f"{channel}.mlp.router.weight",
        f"{ours}.channel.experts.w_in": _halves(form, f"{channel}.mlp.{experts['fc1']}"),
        f"{ours}.channel.experts.w_out": f"{channel}.mlp.{experts['fc2']}",
        f"{ours}.channel.shared_in.weight": _halves(form, f"{channel}.mlp.shared_experts.linear_fc1.weight"),
        f"{ours}.channel.shared_out.weight": f"{channel}.mlp.shared_experts.linear_fc2.weight",
    }
    return rows


def numbers(model: ModelConfig, form: Storage, hybrid: bool) -> list[dict[str, int | str]]:
    """What the table's placeholders stand for, layer by layer. In a hybrid each branch is a layer of theirs."""
    found, block = [], 0
    for plan in plan_layers(model):
        behind = block + (hybrid and plan.mixer is not None)
        found.append({"mixer": block, "channel": behind, **_norms(plan, form)})
        if isinstance(plan.mixer, attention.Config):
            found[-1]["groups"] = plan.mixer.sizes(model.d_model)[1]
        block = behind + (not hybrid or plan.channel is not None)
    return found


def objects(model: ModelConfig, form: Storage, hybrid: bool) -> list[str]:
    """The `_extra_state` that each module of Transformer Engine keeps, which says nothing unless it computes in fp8."""
    count = len(plan_layers(model))
    found = ["decoder.final_norm" if hybrid else "decoder.final_layernorm"]
    found = [f"{name}._extra_state/shard_0_1" for name in [*found, *(["output_layer"] if hybrid else [])]]
    for plan, words in zip(plan_layers(model), numbers(model, form, hybrid), strict=True):
        for branch, modules in (("mixer", _mixer_modules(plan)), ("channel", _channel_modules(plan))):
            for module in modules:
                at, of, whole = (plan.index,), (count,), f"decoder.layers.{module}"
                if not form.stacked:
                    at, of, whole = (), (), f"decoder.layers.{words[branch]}.{module}"
                found += _shards(f"{whole}._extra_state", at, of, plan, form)
    return found


def _shards(name: str, at: tuple[int, ...], of: tuple[int, ...], plan: LayerPlan, form: Storage) -> list[str]:
    def one(name: str, at: tuple[int, ...], of: tuple[int, ...]) -> str:
        return f"{name}/shard_{'.'.join(map(str, at or (0,)))}_{'.'.join(map(str, of or (1,)))}"

    if ".experts.experts." not in name:
        return [one(name, at, of)]
    assert isinstance(plan.channel, moe.Config)
    count = plan.channel.num_experts
    if form.experts == "numbered":
        return [one(name.replace("experts.experts.", f"experts.experts.{e}."), at, of) for e in range(count)]
    return [one(name, (*at, e), (*of, count)) for e in range(count)]


def _mixer_modules(plan: LayerPlan) -> list[str]:
    if isinstance(plan.mixer, mamba2.Config):
        return ["mixer.in_proj", "mixer.out_proj"]
    if not isinstance(plan.mixer, attention.Config):
        return []
    norms = ("q_layernorm", "k_layernorm") if plan.mixer.qk_norm else ()
    return [f"self_attention.{name}" for name in ("linear_qkv", "core_attention", "linear_proj", *norms)]


def _channel_modules(plan: LayerPlan) -> list[str]:
    if isinstance(plan.channel, mlp.Config):
        return ["mlp.linear_fc1", "mlp.linear_fc2"]
    if not isinstance(plan.channel, moe.Config):
        return []
    shared = ["shared_experts"] if plan.channel.shared_d_ff else []
    return ["pre_mlp_layernorm"] + [f"mlp.{m}.linear_fc{n}" for m in ("experts.experts", *shared) for n in (1, 2)]


def _norms(plan: LayerPlan, form: Storage) -> dict[str, str]:
    scan, routed = isinstance(plan.mixer, mamba2.Config), isinstance(plan.channel, moe.Config)
    if form.norms == "modules":
        return {"mixer_norm": "norm." if scan else "input_layernorm.", "channel_norm": "pre_mlp_layernorm."}
    before = "pre_mlp_layernorm." if routed and form.norms == "mixed" else "mlp.linear_fc1.layer_norm_"
    inside = "mixer.in_proj" if scan else "self_attention.linear_qkv"
    return {"mixer_norm": f"{inside}.layer_norm_", "channel_norm": before}


def _split(form: Storage, name: str) -> Row:
    part = name.split(".mixer.")[1]
    shape = kernel if part == "conv1d.weight" else str
    return tuple(shape(f"{name}.{word}") for word in SPLITS[part].split()) if form.split else shape(name)


def _halves(form: Storage, name: str) -> Row:
    return (f"{name}_w", f"{name}_v") if form.halves else name
