"""What a family is: its table of tensors, and its configuration to ours and back. One file of `families` each.

`to_ours` reads config.json and makes the model part of a run; what our parts cannot do is refused by key. `to_theirs`
makes config.json from a stack, or names the first layer that the family does not have.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import lamella.convert.families
from lamella.channels import mlp, moe, rwkv
from lamella.channels.base import ChannelConfig
from lamella.config import ModelConfig, Strict, check_options
from lamella.convert.map import Table
from lamella.errors import UserError
from lamella.mixers import attention, mamba, mamba2, retention, rwkv6, rwkv7
from lamella.mixers.base import MixerConfig
from lamella.model.stack import LayerPlan, plan_layers

Tree = dict[str, Any]
Part = TypeVar("Part", bound=Strict)
NOTHING = type(None)  # the branch is `-`
UNBOUNDED = (0.0, float("inf"))
# Options that change how a part is trained, not what it computes.
TRAINING = {"aux_loss", "global_aux_loss", "z_loss", "jitter", "dropout", "init_scale"}
# What a family's parts are unless it says otherwise.
ATTENTION: Tree = {"qk_norm": False, "value_residual": False, "rope_dim": None}
PLAIN_ATTENTION = ATTENTION | {"window": None, "qkv_bias": False, "out_bias": False}
MLP: Tree = {"activation": "swiglu"}
MOE: Tree = {
    "activation": "swiglu",
    "routing": "top_k",
    "capacity_factor": None,
    "bias_rate": 0.0,
    "shared_d_ff": 0,
}
KINDS = {
    attention.Config: "attention",
    mamba.Config: "mamba",
    mamba2.Config: "mamba2",
    retention.Config: "retention",
    rwkv6.Config: "rwkv6",
    rwkv7.Config: "rwkv7",
    rwkv.Config: "rwkv",
    mlp.Config: "mlp",
    moe.Config: "moe",
    NOTHING: "-",
}


class Misfit(UserError):
    """A stack that a family does not have; `layer` is the first such layer's number, -1 where it is the whole. `near`:
    the family has parts of these kinds there, with other options.
    """

    def __init__(self, layer: int, message: str, near: bool = True):
        super().__init__(message)
        self.layer, self.near = layer, near


@dataclasses.dataclass(frozen=True)
class Family:
    """`numbers(model)`: for each layer what the table's placeholders stand for besides `{layer}`.

    `unlike`: keys of config.json that transformers takes for what they are not, and their values for a comparison;
    `extra`: tensors of theirs that say nothing, as a regular expression. `claims`: whether a config.json without a
    model_type is the family's; transformers does not read such a folder. `binary`: one file, by `torch.save`.
    `norm` and `embedding_norms`: which of ours it has. `runs_in`: the package that computes such a model. `one_way`: it
    is read, never written. `variant(config.json)`: the rows whose names depend on it.
    """

    name: str  # config.json's model_type
    architecture: str
    table: Table
    to_ours: Callable[["Keys"], Tree]
    to_theirs: Callable[["Stack"], Tree]
    numbers: Callable[[ModelConfig], Sequence[Mapping[str, int]]] | None = None
    claims: Callable[[Tree], bool] | None = None
    extra: str = r"(?!)"
    binary: bool = False
    unlike: Tree = dataclasses.field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    embedding_norms: tuple[bool, ...] = (False,)
    runs_in: Literal["transformers", "fla"] = "transformers"
    one_way: bool = False
    variant: Callable[[Tree], Table] | None = None

    def layers(self, model: ModelConfig) -> Sequence[Mapping[str, int]]:
        return [{}] * len(plan_layers(model)) if self.numbers is None else self.numbers(model)

    def rows(self, tree: Tree) -> Table:
        """The table, as a config.json has it."""
        return self.table if self.variant is None else {**self.table, **self.variant(tree)}

    def read(self, tree: Tree, where: str) -> ModelConfig:
        """config.json -> ours. Raises UserError."""
        model = check_options(ModelConfig, self.to_ours(Keys(tree, where, self.name)), where)
        plan_layers(model)
        return model

    def write(self, model: ModelConfig, length: int) -> Tree:
        """Ours -> config.json, less what every family has. Raises Misfit."""
        return self.to_theirs(Stack(model, self, length))


class Keys:
    """config.json, key by key. A key without a default must be there. Raises UserError that names it."""

    def __init__(self, tree: Tree, where: str, family: str):
        self.tree, self.where, self.family = tree, where, family

    def int(self, key: str, *default: int) -> int:
        return self._get(key, (int,), "a whole number", default)

    def float(self, key: str, *default: float) -> float:
        return float(self._get(key, (int, float), "a number", default))

    def flag(self, key: str, *default: bool) -> bool:
        return self._get(key, (bool,), "true or false", default)

    def list(self, key: str, *default: list) -> list:
        return self._get(key, (list,), "a list", default)

    def only(self, key: str, *values: Any) -> None:
        """One of these, of which the first is the default."""
        value = _plain(self.tree.get(key, values[0]))
        if value not in [_plain(v) for v in values]:
            raise UserError(f"{self.where}: {key}={value}: the stack here has {key}={values[0]} alone")

    def refuse(self, reason: str) -> UserError:
        return UserError(f"{self.where}: {reason}")

    def _get(self, key: str, kinds: tuple[type, ...], what: str, default: tuple) -> Any:
        value = self.tree.get(key)
        if value is None:
            if not default:
                raise UserError(f"{self.where}: {key}: missing; a {self.family} model has it")
            return default[0]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{self.where}: {key}: must be {what}, got {str(value)[:60]}")
        return value


class Stack:
    """One of our models, asked whether a family has it."""

    def __init__(self, model: ModelConfig, family: Family, length: int):
        self.model, self.family, self.length = model, family.name, length
        self.plans = plan_layers(model)
        for key, values in (("norm", (family.norm,)), ("embedding_norm", family.embedding_norms)):
            if getattr(model, key) not in values:
                raise Misfit(-1, f"model.{key}={getattr(model, key)}: {self.family} has {key}={values[0]} alone")

    def parts(self, mixers: Mapping[type, Tree], channels: Mapping[type, Tree]) -> dict[type, Any]:
        """The one configuration of each kind of part, where every layer has one of these kinds with these options."""
        found: dict[type, tuple[LayerPlan, Any]] = {}
        for plan in self.plans:
            for part, kinds in ((plan.mixer, mixers), (plan.channel, channels)):
                kind = type(part)
                if kind not in kinds:
                    there = " or ".join(KINDS[k] for k in kinds)
                    raise self.misfit(plan, f"{self.family} has {there} there, not {_kind(part)}", near=False)
                if part is None:
                    continue
                for key, value in kinds[kind].items():
                    if getattr(part, key) != value:
                        wanted = f"{self.family}'s {KINDS[kind]} has {key}={value} alone"
                        raise self.misfit(plan, f"{key}={getattr(part, key)}, and {wanted}")
                first, one = found.setdefault(kind, (plan, part))
                if (key := _differs(one, part)) is not None:
                    values = f"{key}={getattr(part, key)}, and {getattr(one, key)} in layer {first.index}"
                    raise self.misfit(plan, f"{values}; {self.family} has one {KINDS[kind]} for all layers")
        return {kind: part for kind, (_, part) in found.items()}

    def misfit(self, plan: LayerPlan, reason: str, near: bool = True) -> Misfit:
        return Misfit(plan.index, f"layer {plan.index} ({plan.name}): {reason}", near)

    def first(self, kind: type) -> LayerPlan:
        return next(plan for plan in self.plans if isinstance(plan.mixer, kind) or isinstance(plan.channel, kind))

    def where(self, kind: type) -> list[bool]:
        """Which layers have it."""
        return [isinstance(plan.mixer, kind) or isinstance(plan.channel, kind) for plan in self.plans]


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(lamella.convert.families.__path__))


def family(name: str) -> Family:
    """Raises UserError: no family of that name."""
    if name not in names():
        raise UserError(f"--family {name}: no such family; there is {', '.join(names())}")
    return importlib.import_module(f"lamella.convert.families.{name}").FAMILY


def family_of(tree: Tree, where: str) -> Family:
    """Whose config.json it is. Raises UserError."""
    kind = tree.get("model_type")
    for name in names():
        one = family(name)
        if kind == one.name if one.claims is None else one.claims(tree):
            return one
    raise UserError(f"{where}: model_type {kind}: no stack here for it; there is {', '.join(names())}")


def family_for(model: ModelConfig, length: int, first: str | None) -> Family:
    """The family of transformers that has the stack; `first` is asked before the others.

    Raises Misfit: that of the best fit.
    """
    misfits = []
    for name in sorted(names(), key=lambda name: name != first):
        one = family(name)
        if one.claims is not None:
            continue
        try:
            one.write(model, length)
            return one
        except Misfit as error:
            misfits.append(error)
    raise max(misfits, key=lambda error: (error.layer, error.near))


def stack_of(words: list[str]) -> list[Tree]:
    """Layers as the stack of a model file, folded where they repeat."""
    size = next(n for n in range(1, len(words) + 1) if not len(words) % n and words == words[:n] * (len(words) // n))
    return [{"layers": words[:size], "repeat": len(words) // size}]


def period_of(stack: Stack, kind: type, what: str) -> tuple[int, int]:
    """`period, offset` of the layers that have it: i % period == offset. A period too long where there are none."""
    wanted = stack.where(kind)
    count, best = len(wanted), 0
    for period in range(1, count + 2):
        for offset in range(period):
            fits = next((i for i in range(count) if (i % period == offset) != wanted[i]), count)
            if fits == count:
                return period, offset
            best = max(best, fits)
    raise stack.misfit(stack.plans[best], f"{stack.family} has {what} in every so many layers, this is out of step")


def read_rope(keys: Keys, theta: float) -> tuple[float, Tree]:
    """The base of the rotary positions, as transformers 5 or 4 writes it, and what else is said of them."""
    tree = keys.tree.get("rope_parameters") or {}
    scaling = keys.tree.get("rope_scaling") or tree
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise keys.refuse(f"rope_type={kind}: the positions here are rope_type=default alone")
    return float(tree.get("rope_theta") or keys.tree.get("rope_theta") or theta), tree


def write_rope(theta: float, **more: float) -> Tree:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | more, "rope_theta": theta}


def read_heads(keys: Keys) -> Tree:
    heads = keys.int("num_attention_heads")
    tree: Tree = {"num_heads": heads, "num_kv_heads": keys.int("num_key_value_heads", heads)}
    size = keys.int("head_dim", keys.int("hidden_size") // heads)
    return tree if size * heads == keys.int("hidden_size") else tree | {"head_dim": size}


def write_heads(stack: Stack, part: attention.Config | None, sized: bool) -> Tree:
    """`sized`: the family's heads may have any size."""
    if part is None:
        one = {"num_attention_heads": 1, "num_key_value_heads": 1}
        return one | ({"head_dim": stack.model.d_model} if sized else {})
    heads, groups, size = part.sizes(stack.model.d_model)
    if sized:
        return {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": size}
    if heads * size != stack.model.d_model:
        plan = stack.first(attention.Config)
        raise stack.misfit(plan, f"head_dim={size}, and {stack.family}'s is d_model / num_heads")
    return {"num_attention_heads": heads, "num_key_value_heads": groups}


def refuse_clamp(keys: Keys, key: str = "time_step_limit") -> None:
    limit = keys.tree.get(key)
    if limit is not None and [_plain(v) for v in limit] != list(UNBOUNDED):
        raise keys.refuse(f"{key}={limit}: dt is not clamped here")


def _plain(value: Any) -> Any:
    """transformers writes what JSON does not know as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if isinstance(value, dict) and "__float__" in value else value


def _kind(part: MixerConfig | ChannelConfig | None) -> str:
    return "-" if part is None else getattr(part, "mixer", None) or getattr(part, "channel", "")


def _differs(one: Strict, other: Strict) -> str | None:
    return next(
        (k for k in type(one).model_fields if k not in TRAINING and getattr(one, k) != getattr(other, k)), None
    )
