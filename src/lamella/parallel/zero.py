"""DeepSpeed's ZeRO engine, and the only file that knows its internals (names of 0.19.8: pinned, held by round-trip
tests).

The caller runs backward itself; `step` finishes what hooks of a managed backward would, then lets the engine reduce
over the data group, clip, and update its share of the fp32 masters.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lamella.nn.shard import Parameter, placed_parameters
from lamella.parallel.mesh import Mesh

REDUCE_BUCKET = 50_000_000  # elements


class Zero:
    """An engine over this process's part of the model."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, clip_norm: float, mesh: Mesh):
        import deepspeed

        self.model = model
        for _, parameter in placed_parameters(model):
            parameter.tensor_model_parallel = not parameter.place.replicated  # the norm counts replicas once
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's own deprecations
            parts: Any = deepspeed.initialize(
                model=model, optimizer=optimizer, config=_settings(clip_norm, mesh), mpu=_Groups(mesh)
            )
        self.engine, self.optimizer = parts[:2]

    def step(self, lr: float) -> float:
        """Averages the gradients over the data group, clips, updates. Returns the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.setup_buckets()
        self.optimizer.backward_epilogue()
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def fragments(self) -> Iterator[tuple[str, Parameter, int, dict[str, Tensor]]]:
        """What this process keeps of each parameter: name, parameter, start in it flattened, and 1-d live views.

        The views are `master` and the optimizer's own (`exp_avg`, `exp_avg_sq`); their length is the fragment's.
        """
        inner = self.optimizer.optimizer
        for name, parameter in placed_parameters(self.model):
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            flat = inner.param_groups[mapping.param_group_index]["params"][0]
            start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            kept = {"master": flat} | {k: t for k, t in inner.state[flat].items() if torch.is_tensor(t) and t.dim()}
            n = mapping.lp_fragment_address.numel
            yield name, parameter, start, {k: t.detach().narrow(0, at, n) for k, t in kept.items()}

    def prepare_state(self, step: int, keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> None:
        """Gives a fresh optimizer its state (zeros) and its step count, for a checkpoint to be read into."""
        inner = self.optimizer.optimizer
        for group in inner.param_groups:
            flat = group["params"][0]
            for key in keys:
                inner.state[flat].setdefault(key, torch.zeros_like(flat))
            inner.state[flat]["step"] = torch.tensor(float(step))

    def refresh(self) -> None:
        """The model's parameters from the masters, on every process."""
        self.optimizer.update_lp_params()

    def destroy(self) -> None:
        self.engine.destroy()


def _settings(clip_norm: float, mesh: Mesh) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "steps_per_print": 2**62,
        "zero_optimization": {
            "stage": mesh.layout.zero,
            "contiguous_gradients": True,
            "reduce_bucket_size": REDUCE_BUCKET,
        },
    }


class _Groups:
    """What DeepSpeed asks of a Megatron `mpu`."""

    def __init__(self, mesh: Mesh):
        for name, group in (("model", mesh.tensor), ("tensor_model", mesh.tensor), ("data", mesh.data)):
            setattr(self, f"get_{name}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{name}_parallel_world_size", lambda group=group: group.size())
            setattr(self, f"get_{name}_parallel_rank", lambda group=group: group.rank())
        self.get_pipeline_model_parallel_world_size = lambda: 1
        self.get_pipeline_model_parallel_rank = lambda: 0
        self.get_tensor_model_parallel_src_rank = lambda: dist.get_global_rank(mesh.tensor, 0)
