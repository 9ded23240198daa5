"""DeepSpeed's ZeRO engine, and the only file that knows its internals (names of 0.19.8: pinned, held by round-trip
tests).

The caller runs forward and backward through `module` and `backward`; `step` finishes what hooks of a managed backward
would, then lets the engine reduce over the data group, clip, and update its share of the fp32 masters.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lamella.channels.base import Channel
from lamella.mixers.base import Mixer
from lamella.nn.shard import Parameter, Place, placed_parameters
from lamella.parallel.mesh import Mesh

REDUCE_BUCKET = 50_000_000  # elements; DeepSpeed allocates them whatever the model's size


class Zero:
    """An engine over this process's part of the model."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, clip_norm: float, mesh: Mesh):
        import deepspeed

        self.model, self.mesh, self.stage = model, mesh, mesh.layout.zero
        whole = model
        for _, parameter in placed_parameters(model):
            parameter.tensor_model_parallel = not parameter.place.replicated  # the norm counts replicas once
            parameter.ds_pipe_replicated = parameter.place.copy
        if mesh.layout.expert > 1:
            whole = _with_experts(model, optimizer, mesh)
        if self.stage == 3:  # a branch's parameters are gathered together: parts use each other's
            branches = [m for m in model.modules() if isinstance(m, (Mixer, Channel))]
            deepspeed.utils.set_z3_leaf_modules(model, list({type(m) for m in branches}), raise_if_not_found=False)
        settings = _settings(clip_norm, sum(p.numel() for p in whole.parameters()), _largest(model), mesh)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's own deprecations
            parts: Any = deepspeed.initialize(
                model=whole, optimizer=optimizer, config=settings, mpu=_Groups(mesh)
            )
        self.engine, self.optimizer = parts[:2]

    @property
    def module(self) -> Callable[..., Tensor]:
        """What to call for the model."""
        return self.model if self.stage == 1 else self.engine

    def backward(self, loss: Tensor) -> None:
        if self.stage == 1:
            loss.backward()
        else:
            self.engine.backward(loss)

    def step(self, lr: float) -> float:
        """Averages the gradients over the data group, clips, updates. Returns the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 1:
            for parameter in self.engine.module.parameters():  # also what no token has reached
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.setup_buckets()
            self.optimizer.backward_epilogue()
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def gradients(self) -> Iterator[tuple[str, Place, Tensor]]:
        """The step's whole gradients before `step`, this rank's part of each. All processes together."""
        from deepspeed.utils import safe_get_full_grad

        if self.stage == 2:  # what `step` will do; but it empties what it reads
            kept = dict(self.optimizer.all_grad_tensors)
            self.optimizer.finalize_gradient_accumulation_boundary()
            self.optimizer.all_grad_tensors.update(kept)
        for name, parameter in placed_parameters(self.model):
            place = parameter.place
            if self.stage == 1:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
                dist.all_reduce(grad, group=self.mesh.expert_data if place.expert else self.mesh.data)
                grad = grad / self.mesh.layout.data
            elif self.stage == 2:
                grad = safe_get_full_grad(parameter)
                assert grad is not None, name
                grad = grad.detach().clone()
            else:
                start, part = self._gradient_part(parameter)
                grad = part.new_zeros(math.prod(place.local_shape))
                grad[start : start + len(part)] = part
                dist.all_reduce(grad, group=self.mesh.data)
                grad = grad.view(place.local_shape)
            yield name, place, grad

    def parameters(self) -> Iterator[tuple[str, Place, Tensor]]:
        """This rank's part of each parameter, whole over the data group. All processes together."""
        with self._gathered():
            for name, parameter in placed_parameters(self.model):
                yield name, parameter.place, parameter.detach().clone()

    def give(self, gradient: Callable[[str, Place], Tensor]) -> None:
        """Sets the gradients as if a backward pass had found these, the same on every rank that holds the parameter."""
        given: list[tuple[Any, Tensor]] = []
        for name, parameter in placed_parameters(self.model):
            # The engine divides by the data size whatever group it sums over.
            times = self.mesh.layout.data / self.mesh.expert_data.size() if parameter.place.expert else 1
            given.append((parameter, times * gradient(name, parameter.place).to(parameter.device)))
        if self.stage == 1:
            for parameter, grad in given:
                parameter.grad = grad
        elif self.stage == 2:
            self.backward(torch.stack([(p * grad).sum() for p, grad in given]).sum())
        else:
            for parameter, grad in given:
                start, part = self._gradient_part(parameter)
                part.copy_(grad.flatten()[start : start + len(part)])
                if len(part):
                    self.optimizer._offload_boundary_param_ids.add(parameter.ds_id)
            self.optimizer.independent_gradient_partition_epilogue()

    def fragments(self) -> Iterator[tuple[str, Parameter, int, dict[str, Tensor]]]:
        """What this process keeps of each parameter: name, parameter, start in it flattened, and 1-d live views.

        The views are `master` and the optimizer's own (`exp_avg`, `exp_avg_sq`); their length is the fragment's.
        """
        inner = self.optimizer.optimizer
        for name, parameter, start, flat, at, n in self._fragments():
            kept = {"master": flat} | {k: t for k, t in inner.state[flat].items() if torch.is_tensor(t) and t.dim()}
            yield name, parameter, start, {k: t.detach().narrow(0, at, n) for k, t in kept.items()}

    def prepare_state(self, step: int, keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> None:
        """Gives a fresh optimizer its state (zeros) and its step count, for a checkpoint to be read into."""
        state = self.optimizer.optimizer.state
        for flat in self._flats():
            for key in keys:
                state[flat].setdefault(key, torch.zeros_like(flat))
            state[flat]["step"] = torch.tensor(float(step))

    def refresh(self) -> None:
        """The model's parameters from the masters, on every process."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        live: list[Any] = [p for p in self.model.parameters() if p.ds_status.name == "AVAILABLE"]  # type: ignore
        for parameter in live:
            parameter.partition(has_been_updated=False)
        for _, parameter, _, flat, at, n in self._fragments():
            parameter.ds_tensor.data.narrow(0, 0, n).copy_(flat.detach().narrow(0, at, n))  # type: ignore
        if live:
            live[0].all_gather(live)

    def destroy(self) -> None:
        self.engine.destroy()

    def _gradient_part(self, parameter: Any) -> tuple[int, Tensor]:
        """Of stage 3: where this process's part of the flattened gradient starts, and the part, a view."""
        zero: Any = self.optimizer
        part = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[parameter.ds_id].view(-1)
        start = part.numel() * zero._get_param_partition_rank(parameter)
        return start, part[: max(0, parameter.ds_numel - start)]

    def _gathered(self) -> contextlib.AbstractContextManager[Any]:
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()))

    def _flats(self) -> list[Tensor]:
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [group["params"][0] for group in self.optimizer.optimizer.param_groups]

    def _fragments(self) -> Iterator[tuple[str, Parameter, int, Tensor, int, int]]:
        """Name, parameter, start in it flattened; the flat master that holds it, where, and how many elements."""
        for name, parameter in placed_parameters(self.model):
            if self.stage == 3:
                zero: Any = self.optimizer
                group, at, n = zero.grad_position[zero.get_param_id(parameter)]
                start = n * zero._get_param_partition_rank(parameter)
                held = max(0, min(n, parameter.ds_numel - start))  # type: ignore[attr-defined]
                yield name, parameter, start, zero.fp32_partitioned_groups_flat[group], at, held
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                flat = self.optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield name, parameter, low.start, flat, high.start, low.numel


def _largest(model: nn.Module) -> int:
    """Elements of the largest branch or single parameter: what has to be whole at once."""
    branches = (m for m in model.modules() if isinstance(m, (Mixer, Channel)))
    sizes = [sum(p.numel() for p in branch.parameters()) for branch in branches]
    return max([*sizes, *(p.numel() for p in model.parameters())])


def _settings(clip_norm: float, whole: int, largest: int, mesh: Mesh) -> dict[str, Any]:
    """`whole`, `largest`: elements of the model, and of what has to be gathered at once."""
    zero: dict[str, Any] = {
        "stage": mesh.layout.zero,
        "contiguous_gradients": True,
        "reduce_bucket_size": min(REDUCE_BUCKET, whole),
    }
    if mesh.layout.zero == 3:  # what is computed and what comes next; by its defaults all of a model of up to 1e9 stays
        zero |= {"stage3_max_live_parameters": 2 * largest, "stage3_max_reuse_distance": largest}
        zero |= {"stage3_prefetch_bucket_size": largest, "reduce_bucket_size": min(REDUCE_BUCKET, 2 * largest)}
    if mesh.layout.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": mesh.device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, also where the optimizer is offloaded
        "communication_data_type": "fp32",
        "steps_per_print": 2**62,
        "zero_optimization": zero,
    }


class _Groups:
    """What DeepSpeed asks of a Megatron `mpu`."""

    def __init__(self, mesh: Mesh):
        groups = {"model": mesh.model, "tensor_model": mesh.tensor, "pipeline_model": mesh.pipeline, "data": mesh.data}
        for name, group in groups.items():
            setattr(self, f"get_{name}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{name}_parallel_world_size", lambda group=group: group.size())
            setattr(self, f"get_{name}_parallel_rank", lambda group=group: group.rank())
        self.get_tensor_model_parallel_src_rank = lambda: dist.get_global_rank(mesh.tensor, 0)


def _with_experts(model: nn.Module, optimizer: Optimizer, mesh: Mesh) -> nn.Module:
    """The model with what makes DeepSpeed treat dealt experts apart: a group of their own in the optimizer, marks on
    the parameters, and a module of its MoE class that brings the process groups.

    A process without experts gets a parameter that stands in for them: all need the same number of groups.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    name = f"ep_size_{mesh.layout.expert}"

    class Groups(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = mesh.layout.expert

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            for kind, group in (("EXPERT", mesh.expert), ("EXPERT_DATA", mesh.expert_data)):
                getattr(groups, f"_{kind}_PARALLEL_GROUP")[name] = group
                getattr(groups, f"_{kind}_PARALLEL_GROUP_RANKS")[name] = dist.get_process_group_ranks(group)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.groups = model, Groups()

        def forward(self, *args: Any) -> Any:
            return self.model(*args)

    whole = Whole()
    experts = {p for _, p in placed_parameters(model) if p.place.expert}
    taken: list[nn.Parameter] = [p for p in model.parameters() if p in experts]
    decay = next(g for g in optimizer.param_groups if g["params"])
    for group in optimizer.param_groups:
        if experts.intersection(group["params"]):
            decay = group
        group["params"] = [p for p in group["params"] if p not in experts]
    if not taken:
        whole.groups.stand_in = nn.Parameter(torch.zeros(8, device=mesh.device))
        taken = [whole.groups.stand_in]
    for parameter in taken:
        parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
        parameter.model_parallel = True  # type: ignore[attr-defined]
    options = {k: v for k, v in decay.items() if k not in ("params", "name")}
    optimizer.add_param_group({**options, "params": taken, "moe": True, "name": name})
    return whole
