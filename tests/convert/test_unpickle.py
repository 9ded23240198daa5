"""Foreign pickles are read as data: what they name is never imported or called, and damaged ones end in one line."""

import argparse
import builtins
import collections
import io
import os
import pickle
import random
import struct
import sys
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lamella.checkpoint.saved import Saved, read_saved
from lamella.checkpoint.unpickle import KNOWN, Record, read_pickle
from lamella.errors import UserError


def touch(*_):
    raise AssertionError("a pickle called this")


class Reduced:
    """An object whose pickle calls `function(*args)`, and builds `state` on what comes of it."""

    def __init__(self, function, args, state=None):
        self.it = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.it


class Sets:
    def __setstate__(self, state):
        touch()


def pid(what: bytes) -> bytes:
    return b"\x80\x02" + what + b"."


def code(module: str, name: str, *rest: bytes) -> bytes:
    return b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"".join(rest) + b"."


RUN = b"X\x04\x00\x00\x00true\x85R"
MALICIOUS = {
    "os.system": (pickle.dumps(Reduced(os.system, ("touch HERE",))), "system"),
    "builtins.eval": (pickle.dumps(Reduced(builtins.eval, ("open('HERE', 'w')",))), "builtins.eval"),
    "builtins.exec of protocol 2": (pickle.dumps(Reduced(builtins.exec, ("1",)), 2), "builtins.exec"),
    "builtins.getattr": (pickle.dumps(Reduced(getattr, (collections.OrderedDict, "fromkeys"))), "builtins.getattr"),
    "a chain of getattr": (
        pickle.dumps(Reduced(getattr, (Reduced(getattr, (torch.Size, "__class__")), "__subclasses__"))),
        "builtins.getattr",
    ),
    "a dotted name": (code("torch", "serialization.os.system", RUN), "torch.serialization.os.system"),
    "a dotted name below a known one": (b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93.", "torch.Size.__new__"),
    "a module of a known prefix": (code("torch.distributed.checkpoint.metadata", "os", RUN), "metadata.os"),
    "INST": (b"(X\x04\x00\x00\x00trueios\nsystem\n.", "no plain data"),
    "OBJ": (b"(cos\nsystem\nX\x04\x00\x00\x00trueo.", "os.system"),
    "an extension": (b"\x80\x02\x82\x01.", "no plain data"),
    "nested in an argument": (pickle.dumps(argparse.Namespace(a=[{"b": Reduced(os.system, ("true",))}])), "system"),
    "nested in a known class": (
        pickle.dumps(Metadata({}, None, {MetadataIndex("x"): Reduced(os.popen, ("true",))})),  # type: ignore[dict-item]
        "os.popen",
    ),
    "a class with __setstate__": (pickle.dumps(Sets()), "Sets"),
    "a known class that builds state": (
        code("torch.distributed.checkpoint.metadata", "Metadata", b"}X\x03\x00\x00\x00keyK\x01sb"),
        "attributes of what is no object",
    ),
    "attributes of a function": (code("torch", "Size", b"N}X\x08\x00\x00\x00__code__K\x01s\x86b"), "no object"),
    "a call of a type": (code("torch", "float32", b")R"), "a call of what is no class"),
    "a call of a record": (code("argparse", "Namespace", b")\x81)R"), "a call of what is no class"),
    "a call of a text": (b"\x80\x04X\x02\x00\x00\x00os)R.", "a call of what is no class"),
    "NEWOBJ_EX": (code("argparse", "Namespace", b")}\x92"), "no plain data"),
    "a storage": (code("torch.storage", "_load_from_bytes", b"C\x01a\x85R"), "torch.storage._load_from_bytes"),
    "a storage type": (code("torch", "FloatStorage", b")R"), "torch.FloatStorage"),
    "a reference": (pid(b"X\x01\x00\x00\x00aQ"), "a reference to something outside"),
    "a reference in text": (b"Pabc\n.", "no plain data"),
    "a hook": (
        pickle.dumps(Reduced(torch._utils._rebuild_parameter, (1, True, Reduced(os.system, ("true",))))),
        "system",
    ),
    "a name that is no text": (b"\x80\x04K\x01K\x02\x93.", "no plain data"),
    "a name over two lines": (code("o\x1bs", "system", RUN), "o?s.system"),
    "a list for a mapping": (b"\x80\x04]K\x01K\x02s.", "no plain data"),
    "a memo beyond memory": (b"\x80\x02K\x01r\xff\xff\xff\xff.", None),
    "a length beyond memory": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
    "bytes to be made": (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "no plain data"),
}


@pytest.mark.parametrize(("raw", "text"), MALICIOUS.values(), ids=MALICIOUS)
def test_what_would_run_is_refused_by_name(raw, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickle, "loads", touch)
    modules = set(sys.modules)
    if text is None:
        read_pickle(raw, "it")  # nothing of such size is made
    else:
        with pytest.raises(UserError) as refusal:
            read_pickle(raw, "it")
        assert text in str(refusal.value) and str(refusal.value).startswith("it: ")
        assert "\n" not in str(refusal.value) and "\x1b" not in str(refusal.value)
    assert set(sys.modules) == modules and not list(tmp_path.iterdir())


def test_the_same_within_a_saved_file(tmp_path):
    for what, name in ((Reduced(os.system, ("true",)), "system"), (pytest.raises, "raises"), (Sets(), "Sets")):
        torch.save({"args": argparse.Namespace(x=what)}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=rf"x.pt: holds \S*{name}, which is never loaded"):
            read_saved(tmp_path / "x.pt")


def test_known_names_are_exact_and_their_classes_are_not_loaded():
    metadata = Metadata(
        {"x": TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([4]), [])},
        {"a": ("b", 1)},
        {MetadataIndex("x", torch.Size([0])): ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))},
    )
    for protocol in range(2, 6):
        found = read_pickle(pickle.dumps(metadata, protocol), "it")
        assert isinstance(found, Record) and found.kind.endswith(".Metadata")
        held = found.state["state_dict_metadata"]["x"]
        assert held.state["size"] == (4,) and held.state["properties"].args[0] is torch.bfloat16
        (index,) = found.state["storage_data"]
        assert index.state["fqn"] == "x" and index.state["offset"] == (0,)
    assert not any(callable(getattr(known, "__self__", None)) for known in KNOWN.values())
    assert all("*" not in name and name.count(".") for name in KNOWN)


def test_plain_things_are_what_they_were():
    value = {"a": [1, 2.5, None, True, b"x", "ü", (1,), {3}, frozenset([4]), 2**80, -1], 5: {"b": ()}, (1, 2): []}
    for protocol in range(6):
        assert read_pickle(pickle.dumps(value, protocol), "it") == value
    made = collections.OrderedDict(a=1)
    made.attribute = os  # type: ignore[attr-defined]
    del made.attribute  # type: ignore[attr-defined]
    assert read_pickle(pickle.dumps(made), "it") == {"a": 1}
    found = read_pickle(pickle.dumps(argparse.Namespace(lr=1e-3, betas=(0.9, 0.95), dtype=torch.float16)), "it")
    assert found.state == {"lr": 1e-3, "betas": (0.9, 0.95), "dtype": torch.float16}


def test_saved_tensors(tmp_path):
    base = torch.randn(6, 8)
    values = {
        "whole": base,
        "view": base[1:5:2, 2:7].t(),
        "parameter": torch.nn.Parameter(base.bfloat16()),
        "number": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "none of them": [torch.Size([1, 2]), torch.float16],
        "state": torch.nn.Linear(3, 2).state_dict(),
    }
    torch.save(values, tmp_path / "x.pt")
    for offset in (0, 1, 1234):  # as in a file of DCP's, which aligns nothing
        raw = (tmp_path / "x.pt").read_bytes()
        (tmp_path / "y").write_bytes(b"-" * offset + raw + b"-" * 77)
        found = read_saved(tmp_path / "y", offset, len(raw))
        for name in ("whole", "view", "parameter", "number", "empty"):
            held = found[name]
            assert isinstance(held, Saved) and held.dtype == values[name].dtype
            assert torch.equal(held.tensor(), values[name].detach()), name
        assert found["none of them"] == [(1, 2), torch.float16]
        assert torch.equal(found["state"]["weight"].tensor(), values["state"]["weight"])


def crafted(tmp_path, change):
    """A saved tensor whose pickle is another."""
    buffer = io.BytesIO()
    torch.save(torch.arange(6.0), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for info in old.infolist():
            raw = old.read(info)
            new.writestr(info.filename, change(raw) if info.filename.endswith("data.pkl") else raw)
    return tmp_path / "x.pt"


def test_a_tensor_beyond_its_storage(tmp_path):
    with pytest.raises(UserError, match="beyond its storage"):
        read_saved(crafted(tmp_path, lambda raw: raw.replace(b"K\x06\x85q", b"K\x07\x85q", 1)))
    with pytest.raises(UserError, match="larger than its entry"):
        read_saved(crafted(tmp_path, lambda raw: raw.replace(b"K\x06tq", b"K\x60tq", 1)))
    with pytest.raises(UserError, match="never loaded"):
        read_saved(crafted(tmp_path, lambda raw: raw.replace(b"torch._utils", b"torch._utilz")))
    assert torch.equal(read_saved(crafted(tmp_path, lambda raw: raw)).tensor(), torch.arange(6.0))


def test_files_that_are_no_such_file(tmp_path):
    for raw in (b"", b"PK", b"x" * 100, pickle.dumps({"a": 1}), struct.pack("<I", 0x04034B50) * 20):
        (tmp_path / "x.pt").write_bytes(raw)
        with pytest.raises(UserError, match=r"x\.pt: damaged"):
            read_saved(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as packed:
        packed.writestr("a/b", b"c")
    with pytest.raises(UserError, match=r"not what torch\.save writes"):
        read_saved(tmp_path / "y.pt")
    with pytest.raises(UserError, match="missing"):
        read_saved(tmp_path / "z.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_saved(tmp_path)


def test_truncated_and_random_bytes(tmp_path):
    """Either it is read, or it ends in one line; nothing else is ever raised."""
    draw = random.Random(0)
    plain = pickle.dumps(argparse.Namespace(a=[1, {"b": (2.0, "c")}], size=torch.Size([3]), d=torch.bfloat16))
    torch.save({"x": torch.randn(3, 2), "args": argparse.Namespace(a=1)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    refused = 0
    for number in range(3000):
        raw = bytearray(plain)
        if number % 3 == 0:
            raw = raw[: draw.randrange(len(raw))]
        elif number % 3 == 1:
            for _ in range(draw.randint(1, 4)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
        else:
            raw = bytearray(draw.randbytes(draw.randint(0, 60)))
        refused += _reads(lambda raw=bytes(raw): read_pickle(raw, "it"))
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        (tmp_path / "y.pt").write_bytes(raw[: draw.choice((len(raw), draw.randrange(len(raw))))])
        refused += _reads(lambda: _touch_all(read_saved(tmp_path / "y.pt")))
    assert refused > 2000


def _touch_all(value):
    for item in value.values() if isinstance(value, dict) else ():
        if isinstance(item, Saved):
            item.tensor().sum()


def _reads(function) -> bool:
    try:
        function()
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False
