"""Checkpoints that megatron-core wrote come in and go back: the same tensors, and the logits of its own models."""

import argparse
import json
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import MetadataIndex

from lamella.checkpoint.saved import read_saved
from lamella.config import ModelConfig
from lamella.convert.family import Misfit
from lamella.convert.megatron.convert import from_megatron, to_megatron
from lamella.convert.megatron.folder import Folder
from lamella.convert.megatron.to_arguments import to_arguments
from lamella.convert.ours import Checkpoint
from lamella.errors import UserError
from lamella.nn.rows import one_document
from lamella.parallel.local import run_local
from lamella.train.restore import load_model
from tests.commands import call
from tests.convert import megatron_peer as peer
from tests.convert.stacks import save_stack

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]
FEW = ("gpt-tensor2", "gpt-masters", "moe-apart", "hybrid-tensor2")
STEP = "iter_0000007"
ALL = [pytest.param(name, marks=() if name in FEW else pytest.mark.full) for name in peer.CASES]


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory):
    """Of each case: the folder that megatron wrote, ours, what we wrote. Those of a group are written together."""
    folder, done = tmp_path_factory.mktemp("megatron"), {}

    def get(name):
        if name not in done:
            group = [other for other in peer.CASES if (other in FEW) == (name in FEW)]
            for size in (1, 2):
                cases = {n: peer.CASES[n] for n in group if _size(peer.CASES[n]) == size}
                outcomes = run_local(size, peer.write, cases, folder / "theirs", timeout=500)
                assert [o.code for o in outcomes] == [0] * size
            for one in group:
                ours = from_megatron(folder / "theirs" / one, folder / "ours" / one)
                back = to_megatron(folder / "ours" / one, folder / "back" / one)
                done[one] = folder / "theirs" / one, ours, back
        return done[name]

    return get


@pytest.fixture(scope="module")
def logits(there_and_back):
    """Of megatron's own models: from the checkpoint that it wrote, and from ours, loaded as strictly as it can."""
    done = {}

    def get(name):
        if name not in done:
            group = [other for other in peer.CASES if (other in FEW) == (name in FEW)]
            cases = [peer.CASES[one] for one in group]
            found = []
            # The masters among its own are more than the model asks for.
            for column, strict in ((0, "return_all"), (2, "raise_all")):
                paths = [_folder(there_and_back(one)[column]) / STEP for one in group]
                (outcome,) = run_local(1, peer.load, cases, paths, strict, timeout=500)
                assert outcome.code == 0
                found.append(outcome.value)
            done.update({one: both for one, *both in zip(group, *found, strict=True)})
        return done[name]

    return get


@pytest.mark.parametrize("name", ALL)
def test_the_same_tensors(name, there_and_back):
    theirs, ours, back = there_and_back(name)
    had, has = Folder(theirs), Folder(back.target)
    kept = {n for n in had.tensors if not n.startswith("optimizer.")}
    assert has.tensors.keys() == kept and has.objects == had.objects
    for tensor in kept:
        assert had.tensors[tensor].shape == has.tensors[tensor].shape and had.dtype(tensor) == has.dtype(tensor)
        assert torch.equal(had.read(tensor), has.read(tensor)), tensor
    plain = {key: value for key, value in had.args.items() if not hasattr(value, "kind")}
    plain = {key: value for key, value in plain.items() if not isinstance(value, torch.dtype)}
    assert plain == has.args and len(had.args) == len(plain) + 3  # less its labels and a dtype
    assert has.common["iteration"] == had.common["iteration"] == 7
    assert (back.target / "latest_checkpointed_iteration.txt").read_text() == "7"
    form = had.common.get("content_metadata") or {}
    assert bool(has.common["content_metadata"]["singleton_local_shards"]) == bool(form.get("singleton_local_shards"))
    assert ("hybrid" in name) == ours.what.startswith("megatron-core's hybrid")


@pytest.mark.parametrize("name", ALL)
def test_the_same_logits(name, there_and_back, logits):
    theirs, again = logits(name)
    assert torch.equal(theirs, again)
    _, ours, _ = there_and_back(name)
    model = load_model(ours.checkpoint, ours.model, torch.float32)
    if "masters" in name:
        wide = _logits(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        assert (wide - _logits(model)).abs().max() > 1e-3
    far = (_logits(model) - theirs).abs().max().item()
    print(f"{name}: {far:.1e} of {theirs.abs().max():.1f}")
    assert theirs.abs().max() > 0.5 and far < 1e-5


@pytest.mark.parametrize("group", [FEW, pytest.param(tuple(peer.CASES), marks=pytest.mark.full)], ids=["few", "all"])
def test_two_tensor_ranks_load_ours(group, there_and_back):
    odd = {"ffn_hidden_size": 19, "mamba_num_groups": 3, "expert": 2}
    wide = [n for n in group if not any(peer.CASES[n].get(key) == value for key, value in odd.items())]
    paths = [there_and_back(n)[2].target / STEP for n in wide]
    cases = [peer.CASES[n] for n in wide]
    outcomes = run_local(2, peer.load, cases, paths, "raise_all", {"tensor": 2}, timeout=500)
    assert [o.code for o in outcomes] == [0, 0]


HEADS = {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2, "rope_theta": 500.0}
PARTS = {
    "a": HEADS,
    "m": {"mixer": "mamba2", "d_state": 8, "head_dim": 8, "num_groups": 2},
    "f": {"channel": "mlp", "d_ff": 40},
    "e": {"channel": "moe", "num_experts": 4, "d_ff": 24, "renormalize": True},
}
OWN = {
    "gpt": (["a/f", "a/f"], {}),
    "hybrid": (["m/f", "a/-", "m/e"], peer.SCAN | peer.MOE | {"pattern": "M-*ME"}),
}


@pytest.mark.parametrize("name", OWN)
def test_a_model_of_ours_goes_out(name, tmp_path):
    """It loads without any option, with the objects that Transformer Engine's modules would ask for."""
    layers, more = OWN[name]
    used = {word for layer in layers for word in layer.split("/")}
    tree = {"d_model": 32, "vocab_size": 64, "norm_eps": 1e-5, "tie_embeddings": name == "gpt"}
    tree |= {"parts": {key: part for key, part in PARTS.items() if key in used}, "stack": [{"layers": layers}]}
    path, model = save_stack(tree, tmp_path / "run", step=3)
    done = to_megatron(path, tmp_path / "there")
    folder = tmp_path / "there/iter_0000003"
    case = {"num_layers": 2, "base": 500, "tied": name == "gpt"} | more
    (outcome,) = run_local(1, peer.load, [case], [folder], "assume_ok_unexpected", timeout=300)
    assert outcome.code == 0
    far = (_logits(model) - outcome.value[0]).abs().max().item()
    print(f"{name}: {far:.1e}")
    assert far < 1e-5 and outcome.value[0].abs().max() > 0.3
    again = from_megatron(tmp_path / "there", tmp_path / "again")
    for key, tensor in _masters(path).items():
        assert torch.equal(tensor, _masters(again.checkpoint)[key]), key
    narrow = to_megatron(path, tmp_path / "narrow", "bf16")
    assert narrow.dtype == torch.bfloat16 and Folder(tmp_path / "narrow").args["bf16"] is True
    assert all(Folder(tmp_path / "narrow").dtype(n) == torch.bfloat16 for n in Folder(tmp_path / "narrow").tensors)
    assert done.checkpoint == path


def test_the_stack_is_named_in_both_words():
    tree = {"d_model": 32, "vocab_size": 64, "norm_eps": 1e-5, "parts": PARTS}
    tree["stack"] = [{"layers": ["m/f", "a/e", "m/-"]}]
    args = to_arguments(ModelConfig.model_validate(tree, strict=False), 64)
    assert args["hybrid_override_pattern"] == "M-*EM" and args["num_layers"] == 5
    tree["stack"] = [{"layers": ["a/f", "a/e"], "repeat": 2}]
    args = to_arguments(ModelConfig.model_validate(tree, strict=False), 64)
    assert args["moe_layer_freq"] == [0, 1, 0, 1] and args["num_layers"] == 4


M, A, F, E = PARTS["m"], PARTS["a"], PARTS["f"], PARTS["e"]
MISFITS = [
    (["m/f", "w/f"], {"m": M, "w": {"mixer": "mamba"}, "f": F}, "layer 1 (w/f): megatron's hybrid has mamba2"),
    (["a/f", "b/f"], {"a": A, "b": A | {"window": 4}, "f": F}, "layer 1 (b/f): window=4"),
    (["a/f", "b/f"], {"a": A, "b": A | {"num_kv_heads": 4}, "f": F}, "layer 1 (b/f): num_kv_heads=4, and 2 in layer 0"),
    (["a/f", "a/g"], {"a": A, "f": F, "g": F | {"d_ff": 8}}, "layer 1 (a/g): d_ff=8"),
    (["a/e", "a/f"], {"a": A, "e": E, "f": F | {"activation": "relu2"}}, "activation=relu2, swiglu"),
    (["a/f"], {"a": A | {"out_bias": True}, "f": F}, "layer 0 (a/f): biases"),
    (["a/f"], {"a": A, "f": F | {"activation": "geglu"}}, "activation=geglu"),
    (["a/e"], {"a": A, "e": E | {"capacity_factor": 1.0}}, "capacity_factor=1.0"),
    (["m/f"], {"m": M | {"d_conv": 3}, "f": F}, "layer 0 (m/f): d_conv=3"),
    (["m/f"], {"m": M, "f": F, "eps": 1e-6}, "layer 0 (m/f): norm_eps=1e-06"),
]


@pytest.mark.parametrize(("layers", "parts", "text"), MISFITS)
def test_the_first_layer_that_does_not_fit_is_named(layers, parts, text):
    eps = parts.get("eps", 1e-5)
    parts = {key: part for key, part in parts.items() if key != "eps"}
    tree = {"d_model": 32, "vocab_size": 64, "norm_eps": eps, "parts": parts, "stack": [{"layers": layers}]}
    with pytest.raises(Misfit) as refusal:
        to_arguments(ModelConfig.model_validate(tree, strict=False), 64)
    assert text in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.fixture
def theirs(there_and_back, tmp_path):
    return shutil.copytree(there_and_back("hybrid-tensor2")[0], tmp_path / "theirs")


def args(**values):
    def change(folder):
        common = read_saved(folder / STEP / "common.pt")
        plain = {key: value for key, value in common["args"].state.items() if not hasattr(value, "kind")}
        torch.save(common | {"args": argparse.Namespace(**plain | values)}, folder / STEP / "common.pt")

    return change


def metadata(change):
    def write(folder):
        file = folder / STEP / ".metadata"
        held = pickle.loads(file.read_bytes())
        change(held)
        file.write_bytes(pickle.dumps(held))

    return write


def file_of(name, content):
    def write(folder):
        file = folder / STEP / name
        file.unlink() if content is None else file.write_bytes(content)

    return write


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


EMBEDDING = "embedding.word_embeddings.weight"
A_LOG = "decoder.layers.0.mixer.A_log"


def renamed(held):
    held.state_dict_metadata["decoder.layers.0.mixer.other"] = held.state_dict_metadata.pop(A_LOG)
    for index in [i for i in held.storage_data if i.fqn == A_LOG]:
        held.storage_data[MetadataIndex("decoder.layers.0.mixer.other", index.offset)] = held.storage_data.pop(index)


def more(held):
    held.state_dict_metadata["mtp.x"] = held.state_dict_metadata[A_LOG]
    for index in [i for i in held.storage_data if i.fqn == A_LOG]:
        held.storage_data[MetadataIndex("mtp.x", index.offset)] = held.storage_data[index]


def holed(held):
    held.state_dict_metadata[EMBEDDING].chunks.pop()


def doubled(held):
    chunks = held.state_dict_metadata[EMBEDDING].chunks
    chunks[1] = chunks[0]


def elsewhere(held):
    index = next(i for i in held.storage_data if i.fqn == EMBEDDING)
    held.storage_data[index].relative_path = "../../../etc/passwd"


def short(folder):
    for file in (folder / STEP).glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-700])


WRONG = {
    "no such iteration": (lambda f: (f / "latest_checkpointed_iteration.txt").write_text("9"), "no metadata.json"),
    "no number": (lambda f: (f / "latest_checkpointed_iteration.txt").write_text("x\ny"), "neither the number"),
    "another format": (file_of("metadata.json", json.dumps({"sharded_backend": "zarr"}).encode()), "format zarr"),
    "no format": (file_of("metadata.json", b"{"), "cannot be read"),
    "no metadata": (file_of(".metadata", None), ".metadata: cannot be read"),
    "metadata of something else": (file_of(".metadata", pickle.dumps({"a": 1})), "damaged or incomplete"),
    "no common.pt": (file_of("common.pt", None), "common.pt: missing"),
    "a common.pt that runs": (args(x=Runs()), "holds builtins.exec, which is never loaded"),
    "a metadata that runs": (metadata(lambda m: m.storage_data.update(x=Runs())), "holds builtins.exec"),
    "a cut common.pt": (lambda f: short_common(f), "damaged"),
    "no arguments": (lambda f: torch.save({"iteration": 1}, f / STEP / "common.pt"), "holds no args"),
    "a tensor renamed": (metadata(renamed), "has tensors of nothing that is known here"),
    "a tensor left over": (
        metadata(more),
        "mtp.x has no place",
    ),
    "a hole": (metadata(holed), "has a hole"),
    "two pieces at one place": (metadata(doubled), "two pieces at one place"),
    "a path that leads out": (metadata(elsewhere), "no name of a file"),
    "cut data": (short, "shorter than it should be"),
    "another width": (args(hidden_size=48), "by its args it must be"),
    "more layers": (args(num_layers=9), "layer 7 has tensors of nothing"),
    "fewer layers": (args(num_layers=6, hybrid_override_pattern=None), "has no place in a model of its args"),
    "another pattern": (args(hybrid_override_pattern="M*-MM*-"), "is not that of its tensors, M*-MM-*"),
    "another eps": (args(norm_epsilon=1e-6), "norm_epsilon=1e-06"),
    "a size missing": (args(num_attention_heads=None), "num_attention_heads: missing"),
    "a size of another type": (args(hidden_size="wide"), "hidden_size: must be a whole number"),
    "heads that do not divide": (args(num_query_groups=3), "num_kv_heads=3"),
    "positions unknown here": (args(position_embedding_type="yarn"), "position_embedding_type=yarn"),
    "latent attention": (args(multi_latent_attention=True), "multi_latent_attention=True"),
    "an untied head that is not there": (args(untie_embeddings_and_output_weights=True), "untie_embeddings"),
}  # fmt: skip


def short_common(folder):
    file = folder / STEP / "common.pt"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(("spoil", "text"), WRONG.values(), ids=WRONG)
def test_a_folder_that_is_wrong(spoil, text, theirs, tmp_path, capfd):
    spoil(theirs)
    assert call("convert", theirs, tmp_path / "ours", "--to", "lamella") == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "Warning" not in line]
    assert len(said) == 1 and said[0].startswith("lamella: ") and text in said[0], said
    assert [f.name for f in tmp_path.iterdir()] == ["theirs"]


def test_pipeline_cuts_in_a_pattern_say_nothing(theirs, tmp_path):
    args(hybrid_override_pattern="M*-|MM|-*")(theirs)
    done = from_megatron(theirs, tmp_path / "ours")
    assert done.what == "megatron-core's hybrid M*-MM-*"
    assert yaml.safe_load((tmp_path / "ours/model.yaml").read_text())["stack"][0]["layers"] == [
        "mamba2/-", "attention/mlp", "mamba2/-", "mamba2/mlp", "attention/-",
    ]  # fmt: skip


def test_masters_are_all_taken_or_none(there_and_back, tmp_path):
    source, ours, _ = there_and_back("gpt-masters")
    whole = Folder(source)
    name = "decoder.layers.mlp.linear_fc2.weight"
    assert whole.dtype(name) == torch.bfloat16
    masters = _masters(ours.checkpoint)
    assert torch.equal(masters["layers.1.channel.w_out.weight"], whole.read(f"optimizer.state.fp32_param.{name}")[1])
    kept = Checkpoint(ours.checkpoint).kept
    assert kept is not None and kept.dtype == "float32"  # as which they go to others
    copy = shutil.copytree(source, tmp_path / "copy")
    metadata(lambda m: m.state_dict_metadata.pop(f"optimizer.state.fp32_param.{name}"))(copy)
    narrow = from_megatron(copy, tmp_path / "narrow")
    assert torch.equal(_masters(narrow.checkpoint)["embedding.weight"], whole.read(EMBEDDING).float())
    assert len(narrow.notes) == 1 and "fp32 masters of its optimizer" in ours.notes[0]


def test_one_iteration_and_the_command(there_and_back, tmp_path, capfd):
    source = there_and_back("moe-apart")[0]
    assert call("convert", source / STEP, tmp_path / "ours", "--to", "lamella") == 0
    assert "every tensor in its place" in capfd.readouterr().out
    assert call("convert", tmp_path / "ours", tmp_path / "back", "--to", "megatron") == 0
    assert Folder(tmp_path / "back").tensors.keys() == Folder(source).tensors.keys()
    for words, text in [
        ((source, tmp_path / "x", "--to", "hf"), "a checkpoint of Megatron-LM's; convert it --to lamella"),
        ((tmp_path / "ours", tmp_path / "x", "--to", "lamella"), "a run or a checkpoint of ours; name a folder"),
        ((tmp_path / "ours", tmp_path / "back", "--to", "megatron"), "is there already"),
        ((tmp_path / "ours", tmp_path / "x", "--to", "megatron", "--check"), "--check: goes with Hugging Face"),
        ((tmp_path / "ours", tmp_path / "x", "--to", "megatron", "--family", "gpt"), "--family: goes with"),
    ]:
        assert call("convert", *words) == 2
        assert text in capfd.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["back", "ours"]


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.full)])
def test_random_damage_ends_in_one_line(count, theirs, tmp_path):
    """Bytes of the two pickles altered or cut: nothing but a UserError, or a model of the same tensors."""
    draw = random.Random(count)
    refused = 0
    files = [theirs / STEP / name for name in (".metadata", "common.pt")]
    whole = {file: file.read_bytes() for file in files}
    for number in range(count):
        for file, raw in whole.items():
            file.write_bytes(raw)
        file = files[number % 2]
        raw = bytearray(whole[file])
        for _ in range(draw.randint(1, 5)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        file.write_bytes(raw[: len(raw) if number % 5 else draw.randrange(len(raw))])
        try:
            from_megatron(theirs, tmp_path / "ours")
            shutil.rmtree(tmp_path / "ours")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        assert [f.name for f in tmp_path.iterdir()] == ["theirs"]
    assert refused > count // 4


def _size(case):
    return max(case.get("tensor", 1), case.get("expert", 1))


def _folder(held):
    return getattr(held, "target", held)


@torch.no_grad()
def _logits(model):
    tokens = torch.tensor(peer.TOKENS)
    return model(tokens, one_document(tokens))


def _masters(path):
    ours = Checkpoint(path)
    return {name: p.detach() for name, p in load_model(path, ours.run.model, torch.float32).named_parameters()}


def test_common_is_read_without_loading_a_class(theirs):
    found = read_saved(theirs / STEP / "common.pt")
    assert found["args"].kind == "argparse.Namespace" and found["args"].state["model_type"].kind.endswith("ModelType")


MEMORY = """
import sys
from pathlib import Path
from lamella.convert.megatron.convert import from_megatron, to_megatron
from lamella.convert.universal.convert import from_universal, to_universal
from tests.convert.memory import rise
small, large, out = (Path(word) for word in sys.argv[1:])
for there, back in ((to_megatron, from_megatron), (to_universal, from_universal)):
    name = there.__name__
    there(small, out / f"{name}-a"), back(out / f"{name}-a", out / f"{name}-b")
    print(rise(there, large, out / f"{name}-c"), rise(back, out / f"{name}-c", out / f"{name}-d"))
"""


@pytest.mark.full
def test_no_model_is_held_whole(tmp_path):
    """To and from Megatron and DeepSpeed, of a model of 206 MiB whose largest tensor is of 2."""
    parts = {"a": HEADS | {"num_heads": 8}, "f": {"channel": "mlp", "d_ff": 1024}}
    tree = {"d_model": 512, "vocab_size": 512, "norm_eps": 1e-5, "parts": parts}
    for name, count in (("small", 1), ("large", 24)):
        save_stack(tree | {"stack": [{"layers": ["a/f"], "repeat": count}]}, tmp_path / name, 3, moments=False)
    whole = sum(file.stat().st_size for file in (tmp_path / "large").rglob("*.distcp")) / 2**20
    words = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in ("small", "large", "out"))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rises = [[float(word) for word in line.split()] for line in done.stdout.splitlines() if line[0].isdigit()]
    print(f"{whole:.0f} MiB: {rises} MiB more, there and back")
    assert whole > 200 and len(rises) == 2
    assert all(0 < there < 64 + 16 * 2 and 0 < back < 16 * 2 for there, back in rises)
