"""Against transformers' Jamba: the same weights give the same logits and the same gradients."""

import pytest
import torch

from lamella.config import ModelConfig
from lamella.model.init import generator
from lamella.model.lm import LanguageModel
from tests.nn.building import packed, relative, some

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

LAYERS, D_MODEL, VOCAB, EXPERTS = 6, 32, 50, 4

THEIRS = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 3,
    "attn_implementation": "eager",
}

OURS = {
    "d_model": D_MODEL,
    "vocab_size": VOCAB,
    "parts": {
        "mamba": {"mixer": "mamba", "d_state": 8, "dt_rank": 3},
        "attention": {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2},
        "mlp": {"channel": "mlp", "d_ff": 24},
        "moe": {"channel": "moe", "num_experts": EXPERTS, "top_k": 2, "d_ff": 24},
    },
    "stack": [
        {"layers": ["mamba/mlp", "attention/moe", "mamba/mlp", "mamba/moe", "attention/mlp", "mamba/moe"]},
    ],
}

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
    "router.weight": ("router.weight",),
    "experts.w_in": ("experts.gate_up_proj",),
    "experts.w_out": ("experts.down_proj",),
}
OUTSIDE = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.final_layernorm.weight",),
    "head.weight": ("lm_head.weight",),
}


def names():
    yield from OUTSIDE.items()
    for index in range(LAYERS):
        mixer, channel = OURS["stack"][0]["layers"][index].split("/")
        theirs = {"mamba": (MAMBA, "mamba"), "attention": (ATTENTION, "self_attn"), "mlp": (MLP, ""), "moe": (MOE, "")}
        branches = {"mixer": theirs[mixer], "channel": (theirs[channel][0], "feed_forward")}
        for branch, (table, folder) in branches.items():
            for name, parts in table.items():
                yield f"layers.{index}.{branch}.{name}", tuple(f"model.layers.{index}.{folder}.{p}" for p in parts)
        yield f"layers.{index}.mixer_norm.weight", (f"model.layers.{index}.input_layernorm.weight",)
        yield f"layers.{index}.channel_norm.weight", (f"model.layers.{index}.pre_ff_layernorm.weight",)


def gathered(tensors, parts, shape):
    """Theirs in our layout; the depthwise kernel loses its dim of one."""
    return torch.cat([tensors[part] for part in parts]).view(shape)


@pytest.fixture(scope="module")
def pair():
    theirs = transformers.JambaForCausalLM(transformers.JambaConfig(**THEIRS)).float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(name, 0))
            # Well conditioned matrices; nothing is left at 0 or 1.
            parameter.copy_(0.2 * noise if parameter.dim() > 1 and "A_log" not in name else parameter + 0.2 * noise)
        parameters = dict(theirs.named_parameters())
        ours = LanguageModel(ModelConfig.model_validate(OURS, strict=False))
        used = []
        table = dict(names())
        assert set(table) == {name for name, _ in ours.named_parameters()}
        for name, parameter in ours.named_parameters():
            parameter.copy_(gathered(parameters, table[name], parameter.shape))
            used += table[name]
        assert sorted(used) == sorted(parameters)  # every weight of theirs has one place in ours
    return ours, theirs, table


def loss(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_logits_and_gradients_equal_transformers(pair):
    ours, theirs, table = pair
    tokens = torch.randint(VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))
    got = ours(tokens, packed([[21]] * 3))
    wanted = theirs(input_ids=tokens, use_cache=False).logits
    assert wanted.std() > 0.1
    assert (got - wanted).abs().max() < 1e-4
    assert relative(got, wanted) < 1e-5
    for logits in (got, wanted):
        loss(logits, tokens).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = gathered(gradients, table[name], parameter.shape)
        assert wanted.norm() > 1e-6, name
        assert relative(parameter.grad, wanted) < 1e-4, name


def test_generation_s_states_give_transformers_logits(pair):
    """Ours token by token against theirs over the whole."""
    ours, theirs, _ = pair
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    rows, states = packed([[9]] * 2), {}
    with torch.no_grad():
        now = [slice(t, t + 1) for t in range(9)]
        steps = [ours(tokens[:, time], some(rows, time=time), states) for time in now]
        wanted = theirs(input_ids=tokens, use_cache=False).logits
    assert (torch.cat(steps, 1) - wanted).abs().max() < 1e-4
