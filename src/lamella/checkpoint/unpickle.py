"""Pickles of foreign origin, read as data: nothing that they name is imported, and nothing of theirs is called.

A class that a pickle names becomes a `Record` of what the pickle says about it. The names below are known; any other
is refused by its name. The standard library's unpickler in Python, with the opcodes alone that build containers, is
what walks through the bytes: no opcode here looks up an attribute, and REDUCE takes a function of this file or nothing.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lamella.errors import UserError


class Record:
    """An object of a class that was not loaded: its full name, what it was made of, and its attributes."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple = ()):
        self.kind, self.args, self.state = kind, args, {}

    def get(self, key: str, default: Any = None) -> Any:
        return self.state.get(key, default)

    def __repr__(self) -> str:
        return f"{self.kind}{self.args}"


class Known:
    """What a name in a pickle stands for: `make` gives the value for its arguments, else it is a `Record`."""

    def __init__(self, name: str, make: Callable[..., Any] | None = None):
        self.name, self.make = name, make

    def __call__(self, *args: Any) -> Any:
        return Record(self.name, args) if self.make is None else self.make(*args)


def _size(sizes: Any = ()) -> tuple[int, ...]:
    return tuple(int(n) for n in sizes)


def _ordered(items: Any = ()) -> dict:
    return dict(items)


def _parameter(data: Any, requires_grad: Any = None, hooks: Any = None, state: Any = None) -> Any:
    return data


def _typed(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """A tensor of another class, or with attributes: the tensor."""
    if not isinstance(function, Known) or not isinstance(args, tuple):
        raise pickle.UnpicklingError("a tensor of what is no class")
    return function(*args)


def _bytes(text: Any = "", code: Any = "latin1") -> bytes:
    """As pickles before protocol 3 say bytes."""
    if code != "latin1":
        raise pickle.UnpicklingError("bytes of another encoding")
    return text.encode("latin1")


def _path(*parts: Any) -> str:
    return str(Path(*(str(part) for part in parts)))


DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _bytes,
    "builtins.bytes": lambda: b"",
    "builtins.set": lambda items=(): set(items),
    "builtins.frozenset": lambda items=(): frozenset(items),
    "pathlib.PosixPath": _path,
    "torch.Size": _size,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
}
DCP = "torch.distributed.checkpoint"
RECORDS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "torch.device",
    "torch.serialization._get_layout",
    "torch.nn.parameter.Parameter",
    "torch.Tensor",
    *(
        f"{DCP}.metadata.{name}"
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{DCP}.filesystem._StorageInfo",
    f"{DCP}.filesystem._StoragePrefix",
    *(f"{DCP}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    f"{DCP}.planner.BytesIOWriteData",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    # Labels among megatron's arguments, and its own marks in .metadata.
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
    "megatron.core.enums.ModelType",
    *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "AttnMaskType")),
    *(f"megatron.core.transformer.enums.{name}" for name in ("CudaGraphScope", "LayerType")),
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
    *(f"megatron.core.rerun_state_machine.Rerun{name}" for name in ("Diagnostic", "Mode", "State")),
    "signal.Signals",
    # What DeepSpeed leaves in a universal folder.
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)
KNOWN: dict[str, Any] = {name: Known(name, make) for name, make in FUNCTIONS.items()}
KNOWN |= {name: Known(name) for name in RECORDS}
KNOWN |= {f"torch.{name}": getattr(torch, name) for name in DTYPES}


def read_pickle(raw: bytes, where: str, more: dict[str, Any] | None = None, refer: Callable[..., Any] | None = None):
    """What a pickle says. `more`: names known besides; `refer` answers its persistent ids (a tensor's storage).

    Raises UserError: a name that is not known, or bytes that are no whole pickle of plain things.
    """
    try:
        return _Reader(io.BytesIO(raw), KNOWN | (more or {}), refer, where).load()
    except UserError:
        raise
    except Exception as error:  # whatever damaged bytes lead to
        text = " ".join(str(error).split())[:80] or type(error).__name__
        raise UserError(f"{where}: damaged, or no plain data ({text}); fetch the file again") from None


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]  # the C one cannot be told which opcodes to take
    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(self, file: io.BytesIO, known: dict[str, Any], refer: Callable[..., Any] | None, where: str):
        super().__init__(file)
        self.known, self.refer, self.where = known, refer, where

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if full not in self.known:
            shown = "".join(c if c.isprintable() else "?" for c in full)[:120]
            raise UserError(f"{self.where}: holds {shown}, which is never loaded; only plain data and tensors are")
        return self.known[full]

    def persistent_load(self, pid: Any) -> Any:
        if self.refer is None:
            raise pickle.UnpicklingError("a reference to something outside")
        return self.refer(pid)

    def make(self) -> None:
        args, known = self.stack.pop(), self.stack.pop()
        if not isinstance(known, Known) or not isinstance(args, tuple):
            raise pickle.UnpicklingError("a call of what is no class")
        self.append(known(*args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, dict):  # the attributes of a mapping say nothing of what it holds
            return
        if not isinstance(target, Record):
            raise pickle.UnpicklingError("attributes of what is no object")
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict):
                target.state.update(part)
            elif isinstance(part, tuple):
                target.args = part
            elif part is not None:
                raise pickle.UnpicklingError("attributes that are no mapping")

    _plain = (
        "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 "
        "FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE "
        "SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT "
        "DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE "
        "GLOBAL STACK_GLOBAL BINPERSID"
    )
    dispatch = {
        code: pickle._Unpickler.dispatch[code]  # type: ignore[attr-defined]
        for code in (getattr(pickle, name)[0] for name in _plain.split())
    } | {pickle.REDUCE[0]: make, pickle.NEWOBJ[0]: make, pickle.BUILD[0]: build}
