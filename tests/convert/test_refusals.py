"""What cannot be converted ends in one line and exit code 2, and leaves nothing behind."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.config import ModelConfig
from lamella.convert import check
from lamella.convert import convert as conversion
from lamella.convert.convert import to_hf, to_lamella
from lamella.convert.family import Misfit, family, family_for, names
from lamella.errors import UserError
from tests.commands import call
from tests.convert.models import config_of, saved, write_config

UNTURNED = {"mixer": "attention", "num_heads": 4}
ATTENTION = UNTURNED | {"rope_theta": 1e4}
FEW = ATTENTION | {"num_kv_heads": 2}
MAMBA = {"mixer": "mamba", "d_state": 4}
BARE = MAMBA | {"norms": False}
MLP, MOE = {"channel": "mlp", "d_ff": 48}, {"channel": "moe", "num_experts": 4, "d_ff": 48, "renormalize": True}
NARROW = MOE | {"renormalize": False, "d_ff": 8}
A, M = {"a": UNTURNED, "m": MAMBA, "f": MLP}, {"m": MAMBA, "f": MLP, "e": NARROW}


def model_of(layers, parts, **more):
    tree = {"d_model": 32, "vocab_size": 50, "parts": parts, "stack": [{"layers": layers}], **more}
    return ModelConfig.model_validate(tree, strict=False)


MISFITS = [
    ("llama", ["a/f", "m/f"], {"a": ATTENTION, "m": MAMBA, "f": MLP}, {}, "layer 1 (m/f): llama has attention"),
    ("llama", ["a/f", "b/f"], {"a": ATTENTION, "b": FEW, "f": MLP}, {}, "layer 1 (b/f): num_kv_heads=2"),
    ("llama", ["a/f"], {"a": ATTENTION | {"qk_norm": True}, "f": MLP}, {}, "layer 0 (a/f): qk_norm=True"),
    ("llama", ["a/f"], {"a": UNTURNED, "f": MLP}, {}, "without rope_theta"),
    ("llama", ["a/f"], {"a": ATTENTION | {"qkv_bias": True}, "f": MLP}, {}, "out_bias differ"),
    ("llama", ["a/f"], {"a": ATTENTION, "f": MLP}, {"norm": "layer"}, "model.norm=layer: llama has norm=rms"),
    ("mixtral", ["a/e", "a/f"], {"a": ATTENTION, "e": MOE, "f": MLP}, {}, "layer 1 (a/f): mixtral has moe there"),
    ("mixtral", ["a/e"], {"a": ATTENTION, "e": MOE | {"renormalize": False}}, {}, "renormalize=False"),
    ("mixtral", ["a/e"], {"a": ATTENTION, "e": MOE | {"capacity_factor": 1.0}}, {}, "capacity_factor=1.0"),
    ("mixtral", ["a/e"], {"a": ATTENTION, "e": MOE | {"bias_rate": 0.1}}, {}, "bias_rate=0.1"),
    ("mamba", ["m/-", "m/f"], {"m": BARE, "f": MLP}, {}, "layer 1 (m/f): mamba has - there, not mlp"),
    ("mamba", ["m/-"], {"m": MAMBA}, {}, "layer 0 (m/-): norms=True"),
    ("jamba", ["m/f", "m/f", "a/f", "a/f"], A, {}, "layer 3 (a/f): jamba has attention"),
    ("jamba", ["m/f", "m/e"], M, {}, "layer 1 (m/e): d_ff"),
    ("jamba", ["a/f"], {"a": UNTURNED | {"head_dim": 4}, "f": MLP}, {}, "head_dim=4"),
    ("bamba", ["a/f"], {"a": ATTENTION, "f": MLP}, {}, "rope_dim=4"),
    ("nemotron_h", ["a/f"], {"a": UNTURNED, "f": MLP}, {}, "layer 0 (a/f): activation=swiglu"),
    ("state_spaces", ["m/-"], {"m": BARE}, {}, "norm_eps=1e-06"),
]


@pytest.mark.parametrize(("name", "layers", "parts", "more", "text"), MISFITS)
def test_the_first_layer_that_does_not_fit_is_named(name, layers, parts, more, text):
    with pytest.raises(Misfit) as refusal:
        family(name).write(model_of(layers, parts, **more), 64)
    assert text in str(refusal.value) and "\n" not in str(refusal.value)


def test_without_a_family_the_best_fit_is_named():
    parts = {"a": UNTURNED, "m": MAMBA, "f": MLP, "r": {"mixer": "retention", "num_heads": 2}}
    with pytest.raises(Misfit, match=r"layer 2 \(r/f\): jamba has mamba or attention there, not retention"):
        family_for(model_of(["m/f", "a/f", "r/f"], parts), 64, None)


@pytest.mark.parametrize("name", names())
def test_every_family_is_named_as_its_file(name):
    assert family(name).name == name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    pytest.importorskip("transformers")
    return saved("mixtral", 0, tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def theirs(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "theirs")


def weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def key(**values):
    return lambda folder: write_config(folder, config_of(folder) | values)


def cut(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])


def index(tree):
    def write(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps(tree))

    return write


ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
WRONG = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds no mapping"),
    "no type": (key(model_type=None), "model_type None"),
    "a type unknown here": (key(model_type="gpt2"), "model_type gpt2: no stack here for it; there is bamba"),
    "a key missing": (key(hidden_size=None), "hidden_size: missing"),
    "a key of another type": (key(hidden_size="big"), "hidden_size: must be a whole number"),
    "sizes that do not divide": (key(num_key_value_heads=3), "num_kv_heads=3"),
    "a size of 0": (key(vocab_size=0), "vocab_size"),
    "another activation": (key(hidden_act="gelu"), "hidden_act=gelu"),
    "scaled positions": (key(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), "rope_type=yarn"),
    "a tensor missing": (lambda f: weights(f, lambda t: t.pop(ROUTER)), f"lacks {ROUTER}"),
    "a tensor left over": (lambda f: weights(f, lambda t: t.update(more=torch.ones(1))), "more has no place"),
    "another shape": (key(vocab_size=51), "is [50, 32], by config.json it must be [51, 32]"),
    "integers": (lambda f: weights(f, lambda t: t.update({ROUTER: t[ROUTER].to(torch.int8)})), "stored as I8"),
    "a tied head that differs": (key(tie_word_embeddings=True), "they are tied"),
    "cut off": (cut, "damaged"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"PK" * 50), "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "a shard missing": (index({"weight_map": {ROUTER: "other.safetensors"}}), "other.safetensors: missing"),
    "a name the shard lacks": (index({"weight_map": {"x": "model.safetensors"}}), "lacks x, which the index says"),
    "an index without map": (index({}), "no index of tensors"),
    "an index that leads out": (index({"weight_map": {"x": "../x.safetensors"}}), "no name of a file"),
}


@pytest.mark.parametrize(("spoil", "text"), WRONG.values(), ids=WRONG)
def test_a_folder_that_is_wrong(spoil, text, theirs, tmp_path, capfd):
    spoil(theirs)
    assert call("convert", theirs, tmp_path / "ours", "--to", "lamella", "--no-check") == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("lamella: ") and text in said[0], said
    assert [f.name for f in tmp_path.iterdir()] == ["theirs"]


def test_what_is_no_tensor_is_never_loaded(theirs, tmp_path):
    (theirs / "model.safetensors").unlink()
    torch.save({"x": pytest.raises}, theirs / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors, which is never loaded"):
        to_lamella(theirs, tmp_path / "ours")


def test_options(theirs, tmp_path, capfd):
    (tmp_path / "there").mkdir()
    for words, text in [
        ((theirs, tmp_path / "there", "--to", "lamella"), "is there already"),
        ((tmp_path / "nowhere", tmp_path / "x", "--to", "lamella"), "no such folder"),
        ((theirs, tmp_path / "x", "--to", "lamella", "--dtype", "bf16"), "goes with --to hf"),
        ((theirs, tmp_path / "x", "--to", "hf"), "a Hugging Face model; convert it --to lamella"),
        ((theirs, tmp_path / "x", "--to", "hf", "--shard-gigabytes", "0"), "must be above 0"),
    ]:
        assert call("convert", *words) == 2
        assert text in capfd.readouterr().err


def test_a_family_that_does_not_fit(theirs, tmp_path, capfd):
    assert call("convert", theirs, tmp_path / "ours", "--to", "lamella", "--no-check") == 0
    assert "logits not compared: --no-check" in capfd.readouterr().out
    for name, text in (("llama", "layer 0 (attention/moe): llama has mlp there"), ("lama", "no such family; there is")):
        assert call("convert", tmp_path / "ours", tmp_path / "x", "--to", "hf", "--family", name) == 2
        assert text in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint(theirs, tmp_path):
    path = to_lamella(theirs, tmp_path / "ours").checkpoint
    file = next(path.glob("*.distcp"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="altered"):
        to_hf(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize("where", ["write_weights", "save", "write_json"])
def test_a_full_disk_leaves_nothing(where, theirs, tmp_path, monkeypatch):
    if where != "save":
        to_lamella(theirs, tmp_path / "ours")
    before = sorted(f.name for f in tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, where, full)
    with pytest.raises(UserError, match=r"x: cannot be written .No space left"):
        to_lamella(theirs, tmp_path / "x") if where == "save" else to_hf(tmp_path / "ours", tmp_path / "x")
    assert sorted(f.name for f in tmp_path.iterdir()) == before


def test_what_a_kill_left_is_cleared(theirs, tmp_path):
    (tmp_path / "ours.tmp/checkpoints/step-00000000.tmp").mkdir(parents=True)
    to_lamella(theirs, tmp_path / "ours")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ours", "theirs"]


def test_logits_that_differ(theirs, tmp_path, monkeypatch, capfd):
    assert call("convert", theirs, tmp_path / "ours", "--to", "lamella", "--check") == 0
    assert "largest difference" in capfd.readouterr().out
    monkeypatch.setattr(check, "compare", lambda *_: check.Parity(0.1, 0.01, 1.0))
    assert call("convert", tmp_path / "ours", tmp_path / "one", "--to", "hf") == 1
    assert f"they differ: relative 1e-03 is the bound; do not use {tmp_path / 'one'}" in capfd.readouterr().out
    monkeypatch.setattr(check, "LARGEST", 100)
    assert call("convert", tmp_path / "ours", tmp_path / "two", "--to", "hf") == 0
    assert "parameters; --check compares them" in capfd.readouterr().out
    assert call("convert", tmp_path / "ours", tmp_path / "three", "--to", "hf", "--check") == 1


def test_a_transformers_that_lacks_the_model(theirs, tmp_path):
    done = to_lamella(theirs, tmp_path / "ours")
    write_config(theirs, config_of(theirs) | {"model_type": "of tomorrow"})
    with pytest.raises(UserError, match=r"does not load .*theirs, so no logits are compared"):
        check.compare(done.checkpoint, done.model, done.family, theirs, None)
