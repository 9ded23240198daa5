"""A stack of ours as Megatron-LM's training arguments: those of its GPT, or of its hybrids of Mamba-2."""

import dataclasses
from typing import Any

from lamella.channels import mlp, moe
from lamella.config import ModelConfig
from lamella.convert.family import ATTENTION, MOE, NOTHING, Family, Misfit, Stack, Tree
from lamella.convert.megatron.arguments import SCAN_EPS, SCAN_TAPS, pattern_of
from lamella.mixers import attention, mamba2
from lamella.model.stack import plan_layers


def to_arguments(model: ModelConfig, length: int) -> Tree:
    """Raises Misfit: the first layer that neither its GPT nor its hybrid has."""
    misfits = []
    scans = any(isinstance(plan.mixer, mamba2.Config) for plan in plan_layers(model))
    for kind in (HYBRID,) if scans else (GPT, HYBRID):
        try:
            tree = dataclasses.replace(kind, norm=model.norm).write(model, length)
        except Misfit as error:
            misfits.append(error)
            continue
        return tree | {
            "hidden_size": model.d_model,
            "padded_vocab_size": model.vocab_size,
            "vocab_size": model.vocab_size,
            "make_vocab_size_divisible_by": 1,
            "untie_embeddings_and_output_weights": not model.tie_embeddings,
            "normalization": "RMSNorm" if model.norm == "rms" else "LayerNorm",
            "norm_epsilon": model.norm_eps,
            "init_method_std": model.init_std,
            "seq_length": length,
            "max_position_embeddings": length,
            "hidden_dropout": model.dropout,
            "attention_dropout": 0.0,
            "transformer_impl": "transformer_engine",
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "expert_model_parallel_size": 1,
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
        }
    raise max(misfits, key=lambda error: error.layer)


def _gpt(stack: Stack) -> Tree:
    parts = stack.parts({attention.Config: _HEADS}, {mlp.Config: {}, moe.Config: _EXPERTS})
    freq = [int(isinstance(plan.channel, moe.Config)) for plan in stack.plans]
    routed: Any = 1 if all(freq) else freq
    return {"num_layers": len(stack.plans), "is_hybrid_model": False, "hybrid_override_pattern": None} | (
        _write_parts(stack, parts) | ({"moe_layer_freq": routed} if any(freq) else {})
    )


def _hybrid(stack: Stack) -> Tree:
    mixers = {mamba2.Config: {"d_conv": SCAN_TAPS}, attention.Config: _HEADS, NOTHING: {}}
    parts = stack.parts(mixers, {mlp.Config: {}, moe.Config: _EXPERTS, NOTHING: {}})
    scan = parts.get(mamba2.Config)
    if scan is not None and stack.model.norm_eps != SCAN_EPS:
        reason = f"norm_eps={stack.model.norm_eps}, and megatron's Mamba-2 has {SCAN_EPS} alone"
        raise stack.misfit(stack.first(mamba2.Config), reason)
    pattern = pattern_of(stack.model)
    tree = {"num_layers": len(pattern), "is_hybrid_model": True, "hybrid_override_pattern": pattern}
    tree |= {"hybrid_attention_ratio": 0.0, "hybrid_mlp_ratio": 0.0}
    if scan is not None:
        tree |= {"mamba_state_dim": scan.d_state, "mamba_head_dim": scan.head_dim, "mamba_num_groups": scan.num_groups}
        tree |= {"mamba_num_heads": scan.sizes(stack.model.d_model)[0]}
    return tree | _write_parts(stack, parts)


_HEADS: Tree = {key: value for key, value in ATTENTION.items() if key not in ("qk_norm", "rope_dim")} | {"window": None}
_EXPERTS: Tree = {key: value for key, value in MOE.items() if key not in ("activation", "shared_d_ff")}
GPT = Family("megatron's GPT", "", {}, dict, _gpt)  # type: ignore[arg-type]  # `arguments` reads it
HYBRID = Family("megatron's hybrid", "", {}, dict, _hybrid)  # type: ignore[arg-type]


def _write_parts(stack: Stack, parts: dict[type, Any]) -> Tree:
    heads, dense, experts = (parts.get(kind) for kind in (attention.Config, mlp.Config, moe.Config))
    tree: Tree = {"add_bias_linear": False, "add_qkv_bias": False, "position_embedding_type": "none"}
    biases = {heads.out_bias if heads else None, dense.bias if dense else None} - {None}
    if len(biases) > 1 or (heads and heads.out_bias and not heads.qkv_bias) or (experts and True in biases):
        plan = stack.first(mlp.Config if dense else attention.Config)
        raise stack.misfit(plan, f"biases: {stack.family} has them in every linear layer, in qkv alone, or nowhere")
    tree["add_bias_linear"] = True in biases
    if heads is not None:
        count, groups, size = heads.sizes(stack.model.d_model)
        tree |= {"num_attention_heads": count, "group_query_attention": True, "num_query_groups": groups}
        tree |= {"kv_channels": size, "qk_layernorm": heads.qk_norm}
        tree["add_qkv_bias"] = heads.qkv_bias and not heads.out_bias
        if heads.qk_norm and stack.model.norm != "rms":
            raise stack.misfit(stack.first(attention.Config), "qk_norm, an RMSNorm, in a stack of another norm")
        if heads.rope_theta is not None:
            turned = (heads.rope_dim or size) / size
            tree |= {"position_embedding_type": "rope", "rotary_base": heads.rope_theta, "rotary_percent": turned}
    else:
        tree |= {"num_attention_heads": 1, "kv_channels": stack.model.d_model}
    kinds = {part.activation for part in (dense, experts) if part is not None}
    if len(kinds) > 1 or kinds - {"swiglu", "relu2", "gelu"}:
        plan = stack.first(moe.Config if experts else mlp.Config)
        there = f"{stack.family} has one of swiglu, relu2, gelu"
        raise stack.misfit(plan, f"activation={', '.join(sorted(kinds))}; {there}")
    tree |= {"swiglu": "swiglu" in kinds, "squared_relu": "relu2" in kinds, "bias_gelu_fusion": False}
    tree["ffn_hidden_size"] = dense.d_ff if dense else experts.d_ff if experts else stack.model.d_model
    if experts is not None:
        tree |= {
            "num_experts": experts.num_experts,
            "moe_ffn_hidden_size": experts.d_ff,
            "moe_router_topk": experts.top_k,
            "moe_router_pre_softmax": not experts.renormalize,
            "moe_router_score_function": "softmax",
            "moe_router_load_balancing_type": "seq_aux_loss" if experts.aux_loss else "none",
            "moe_aux_loss_coeff": experts.aux_loss,
            "moe_z_loss_coeff": experts.z_loss or None,
            "moe_input_jitter_eps": experts.jitter or None,
            "moe_shared_expert_intermediate_size": experts.shared_d_ff or None,
            "moe_grouped_gemm": True,
        }
    return tree
