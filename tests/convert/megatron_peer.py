"""megatron-core's own models on a CPU: built, filled, saved by its `dist_checkpointing`, loaded, run.

What needs CUDA and says nothing of the mathematics is replaced: device questions, the tracker of random states, and
mamba_ssm's three kernels, here by the recurrence itself.
"""

import argparse
import contextlib
import sys
import types
import warnings

import torch
import torch.nn.functional as F

TOKENS = [[3, 17, 9, 30, 4, 21, 8, 8, 1, 40, 12, 2], [21, 5, 5, 33, 0, 7, 44, 19, 2, 6, 11, 3]]
WIDTH, VOCAB = 32, 64
BASE = {"hidden_size": WIDTH, "ffn_hidden_size": 40, "num_attention_heads": 4, "num_query_groups": 2, "num_layers": 3}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
SCAN = {"mamba_state_dim": 8, "mamba_head_dim": 8, "mamba_num_groups": 2}
APART = {"singleton_local_shards": True}
# Keys of megatron's TransformerConfig, and those of EXTRAS.
CASES = {
    "gpt": {},
    "gpt-tensor2": {"tensor": 2, "kv_channels": 12, "tied": True, "percent": 0.5},
    "gpt-apart": {"tensor": 2, "form": APART, "num_query_groups": 4, "layernorm_epsilon": 1e-6},
    "gpt-layernorm": {"normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False}
    | {"num_layers": 1},
    "gpt-qk": {"qk_layernorm": True, "add_qkv_bias": True, "gated_linear_unit": False, "activation_func": "relu2"},
    "gpt-masters": {"masters": True, "num_query_groups": 2, "kv_channels": 6},
    "gpt-unturned": {"rope": False, "num_attention_heads": 2, "num_query_groups": 2, "ffn_hidden_size": 19},
    "moe": MOE,
    "moe-apart": MOE | {"tensor": 2, "form": APART, "moe_router_pre_softmax": True},
    "moe-some": MOE | {"moe_layer_freq": [0, 1, 1], "moe_shared_expert_intermediate_size": 16, "num_moe_experts": 3},
    "moe-one": MOE | {"moe_router_topk": 1, "moe_router_pre_softmax": True, "num_moe_experts": 5},
    "moe-expert2": MOE
    | {"expert": 2, "moe_shared_expert_intermediate_size": 8, "form": {"non_homogeneous_layers": True}},
    "hybrid": SCAN | {"pattern": "M-M*-"},
    "hybrid-tensor2": SCAN | {"pattern": "M*-MM-*", "tensor": 2, "tied": True, "rope": False},
    "hybrid-experts": SCAN
    | MOE
    | {"pattern": "ME*-M*E", "mamba_num_heads": 6, "mamba_num_groups": 3, "mamba_state_dim": 5},
    "hybrid-apart": SCAN | {"pattern": "-M*M", "tensor": 2, "form": APART, "mamba_num_groups": 4},
}
EXTRAS = ("base", "tensor", "expert", "form", "pattern", "percent", "tied", "rope", "masters")


class GatedNorm(torch.nn.Module):
    """rms(x * silu(z)) * w over each group of channels: what mamba_ssm's RMSNorm computes."""

    def __init__(self, width, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        assert not norm_before_gate
        self.weight, self.eps, self.group = torch.nn.Parameter(torch.ones(width, dtype=dtype)), eps, group_size

    def forward(self, x, z):
        x = (x * F.silu(z)).unflatten(-1, (-1, self.group))
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


def scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False, **more):
    """h = exp(dt A) h + dt x B^T, y = h C + D x, a step at a time."""
    assert z is None and dt_softplus and not any(value for value in more.values())
    dt = F.softplus(dt + dt_bias)
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    h, out = torch.zeros(*x.shape[0::2], x.shape[3], B.shape[3]), []
    for t in range(x.shape[1]):
        h = (dt[:, t] * A).exp()[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1)


def start():
    """Everything before the first model of a process."""
    import lamella.parallel.cpu_host  # noqa: F401

    assert "megatron.core.ssm.mamba_mixer" not in sys.modules
    parts = {"selective_state_update": {"selective_state_update": None}, "layernorm_gated": {"RMSNorm": GatedNorm}}
    parts["ssd_combined"] = {"mamba_chunk_scan_combined": scan, "mamba_split_conv1d_scan_combined": None}
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        sys.modules[name] = types.ModuleType(name)
    for name, content in parts.items():
        module = sys.modules[f"mamba_ssm.ops.triton.{name}"] = types.ModuleType(name)
        module.__dict__.update(content)
    tensor_ops = types.ModuleType("tensor_ops")  # of inference alone, in triton
    tensor_ops.__dict__.update(dict.fromkeys(("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")))
    sys.modules["megatron.core.inference.contexts.attention_context.triton.tensor_ops"] = tensor_ops
    warnings.simplefilter("ignore")
    torch.cuda.synchronize = lambda *_: None
    torch.distributed.init_process_group("gloo")
    from megatron.core.ssm import mamba_block
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    random.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    moe_utils.te_general_gemm = None
    mamba_block.TENorm = WrappedTorchNorm


@contextlib.contextmanager
def groups(tensor=1, expert=1):
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor, expert_model_parallel_size=expert, expert_tensor_parallel_size=1 if expert > 1 else None
    )
    yield
    parallel_state.destroy_model_parallel()
    stop_writer()


def stop_writer():
    """Ends the process that `dist_checkpointing.save` has started: these processes end without exit functions."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is not None:
        filesystem_async._results_queue._manager.shutdown()
        filesystem_async._results_queue = None


def build(case, tensor=1, expert=1):
    """A model in fp32, filled by name: nothing is left at 0 or 1."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.mamba import MambaModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    options = BASE | {
        "gated_linear_unit": True,
        "activation_func": F.silu if case.get("gated_linear_unit", True) else F.gelu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "layernorm_epsilon": 1e-5,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": tensor,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": 1 if expert > 1 else None,
        "moe_token_dispatcher_type": "allgather",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_mamba_mem_eff_path": False,
    }
    options |= {f"{name}_fusion": False for name in ("bias_activation", "masked_softmax", "bias_dropout")}
    options |= {"persist_layer_norm": False, "gradient_accumulation_fusion": False, "apply_rope_fusion": False}
    options |= {key: value for key, value in case.items() if key not in EXTRAS}
    if case.get("activation_func") == "relu2":
        from megatron.core.activations import squared_relu

        options["activation_func"] = squared_relu
    rope = {"position_embedding_type": "rope" if case.get("rope", True) else "none"}
    rope["rotary_percent"] = case.get("percent", 1.0)
    rope["rotary_base"] = case.get("base", 10000)
    rope |= {"share_embeddings_and_output_weights": case.get("tied", False), "parallel_output": False}
    if "pattern" in case:
        config = TransformerConfig(**options | {"num_layers": len(case["pattern"]), "is_hybrid_model": True})
        model = MambaModel(
            config, hybrid_spec(config), VOCAB, 64, hybrid_override_pattern=case["pattern"],
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), **rope,
        )  # fmt: skip
    else:
        config = TransformerConfig(**options)
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        model = GPTModel(config, spec, VOCAB, 64, **rope)
    fill(model)
    return model.float().eval()


def fill(model):
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * rank + number))
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)


def hybrid_spec(config):
    """As megatron-core's own of hybrids, by modules that need no Transformer Engine, under its names."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    dense = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    routed = get_gpt_layer_local_spec(config.num_moe_experts, normalization="RMSNorm").submodules
    assert dense is not None and routed is not None

    def layer(module, names, **parts):
        return ModuleSpec(module, submodules=TransformerLayerSubmodules(**parts, sharded_state_dict_keys_map=names))

    mixer = ModuleSpec(MambaMixer, submodules=MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear))
    scans = MambaLayerSubmodules(WrappedTorchNorm, mixer, get_bias_dropout_add, {"norm.": "mixer.in_proj.layer_norm_"})
    channel = {"pre_mlp_layernorm": WrappedTorchNorm, "mlp_bda": get_bias_dropout_add}
    return ModuleSpec(
        module=MambaStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(MambaLayer, submodules=scans),
            attention_layer=layer(
                TransformerLayer, {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
                input_layernorm=WrappedTorchNorm, self_attention=dense.self_attention,
                self_attn_bda=get_bias_dropout_add, mlp=IdentityOp,
            ),
            mlp_layer=layer(
                MLPLayer, {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}, mlp=dense.mlp, **channel
            ),
            moe_layer=layer(TransformerLayer, {}, mlp=routed.mlp, **channel),
        ),
    )  # fmt: skip


def arguments(case, model):
    """Megatron-LM's arguments, as its training program would hold them."""
    from megatron.core.enums import ModelType

    c = model.config
    names = {"norm_epsilon": "layernorm_epsilon", "swiglu": "gated_linear_unit", "num_experts": "num_moe_experts"}
    same = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization "
        "add_bias_linear add_qkv_bias qk_layernorm moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax "
        "moe_shared_expert_intermediate_size moe_layer_freq moe_router_load_balancing_type mamba_state_dim "
        "mamba_head_dim mamba_num_heads mamba_num_groups attention_backend moe_aux_loss_coeff window_size softmax_type"
    )
    found = {name: getattr(c, names.get(name, name)) for name in (*same.split(), *names)}
    return argparse.Namespace(
        **found,
        group_query_attention=True,
        squared_relu=case.get("activation_func") == "relu2",
        bias_gelu_fusion=False,
        position_embedding_type="rope" if case.get("rope", True) else "none",
        rotary_base=case.get("base", 10000),
        rotary_percent=case.get("percent", 1.0),
        untie_embeddings_and_output_weights=not case.get("tied", False),
        hybrid_override_pattern=case.get("pattern"),
        max_position_embeddings=64,
        params_dtype=c.params_dtype,
        model_type=ModelType.encoder_or_decoder,
        bf16=bool(case.get("masters")),
    )


def write(cases, folder):
    """Saves each case as this many processes hold it; all of them together."""
    start()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    for name, case in cases.items():
        layout = {key: case.get(key, 1) for key in ("tensor", "expert")}
        with groups(**layout):
            model = build(case, **layout)
            more = {}
            if case.get("masters"):
                wide = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
                model.bfloat16()
                whole = model.sharded_state_dict()
                prefix = "optimizer.state.fp32_param"
                more = {key: make_sharded_optimizer_tensor(whole[key], wide[key], prefix) for key in wide}
            state = {
                "args": arguments(case, model),
                "iteration": 7,
                "checkpoint_version": 3.0,
                "model": model.sharded_state_dict(metadata=dict(case.get("form", {}))),
                "optimizer": more,
            }
            path = folder / name / "iter_0000007"
            if torch.distributed.get_rank() == 0:
                path.mkdir(parents=True)
                (folder / name / "latest_checkpointed_iteration.txt").write_text("7")
            torch.distributed.barrier()
            dist_checkpointing.save(state, str(path), content_metadata=case.get("form"))


def load(cases, paths, strict="raise_all", layouts=None):
    """Each checkpoint, loaded by megatron's own loader into its own model; returns the logits [B, T, V]."""
    start()
    from megatron.core import dist_checkpointing

    found = []
    for case, path in zip(cases, paths, strict=True):
        layout = layouts or {}
        with groups(**layout):
            model = build(case, **layout)
            form = dist_checkpointing.load_content_metadata(str(path)) or {}
            model_state = model.sharded_state_dict(metadata=dict(form))
            state = dist_checkpointing.load({"model": model_state}, str(path), strict=strict)
            if isinstance(state, tuple):
                state, unread, missing = state
                assert not missing and all(name.startswith("optimizer.") for name in unread), (unread, missing)
            assert state["args"].hidden_size == WIDTH and state["iteration"] >= 0
            model.load_state_dict({k: v for k, v in state["model"].items() if "_extra_state" not in k}, strict=False)
            if not layout:
                found.append(run(model))
    return found


@torch.no_grad()
def run(model):
    tokens = torch.tensor(TOKENS)
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    return model(tokens, position, mask)
