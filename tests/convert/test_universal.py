"""Universal folders by DeepSpeed's own converter come in and go back, moments and step too; its engine loads ours."""

import errno
import importlib
import io
import os
import shutil

import pytest
import torch
import yaml

from lamella.checkpoint import store
from lamella.checkpoint.planner import Pieces
from lamella.config import ModelConfig
from lamella.convert.map import places
from lamella.convert.megatron.convert import from_megatron, to_megatron
from lamella.convert.megatron.folder import Folder as Megatron
from lamella.convert.ours import Checkpoint
from lamella.convert.universal.convert import from_universal, to_universal
from lamella.convert.universal.folder import Folder
from lamella.errors import UserError
from lamella.parallel.local import run_local
from tests.commands import call
from tests.convert import deepspeed_peer as peer
from tests.convert import megatron_peer
from tests.convert.stacks import save_stack

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]
PARTS = {
    "a": {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2, "rope_theta": 1e4, "qkv_bias": True},
    "m": {"mixer": "mamba2", "d_state": 8, "head_dim": 8, "num_groups": 2},
    "j": {"mixer": "mamba", "d_state": 5, "dt_rank": 3},
    "f": {"channel": "mlp", "d_ff": 19},
    "e": {"channel": "moe", "num_experts": 3, "d_ff": 16, "shared_d_ff": 8},
}


def stack(*layers, **more):
    used = {word for layer in layers for word in layer.split("/")}
    parts = {name: part for name, part in PARTS.items() if name in used}
    return {"d_model": 32, "vocab_size": 50, "parts": parts, "stack": [{"layers": list(layers)}], **more}


STACK = stack("m/f", "a/e", "j/-", tie_embeddings=True)
STATES = ("fp32", "exp_avg", "exp_avg_sq")
CASES = {  # of the engine that wrote: its ZeRO stage and processes
    "zero1": (1, 2),
    "zero3": (3, 2),
    "zero2": (2, 1),
}
ALL = [pytest.param(name, marks=() if name == "zero1" else pytest.mark.full) for name in CASES]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What DeepSpeed wrote, with a model.yaml beside it, the losses that it had next, ours, and what we wrote."""
    folder, done = tmp_path_factory.mktemp("universal"), {}

    def get(name):
        if name not in done:
            zero, size = CASES[name]
            (folder / name).mkdir()
            outcomes = run_local(size, peer.write, STACK, folder / name, zero, timeout=400)
            assert [o.code for o in outcomes] == [0] * size
            theirs = folder / name / "universal"
            (theirs / "model.yaml").write_text(yaml.safe_dump(STACK))
            ours = from_universal(theirs, folder / f"ours-{name}")
            back = to_universal(folder / f"ours-{name}", folder / f"back-{name}")
            done[name] = theirs, outcomes[0].value, ours, back
        return done[name]

    return get


@pytest.mark.parametrize("name", ALL)
def test_there_and_back(name, written):
    theirs, _, ours, back = written(name)
    had, has = Folder(theirs), Folder(back.target)
    assert had.step == has.step == 3
    assert set(has.names) == set(places(ours.model))
    # A tied head's second name, where ZeRO has no state for it.
    assert set(had.names) - set(has.names) <= {"head.weight"}
    for parameter in has.names:
        for state in STATES:
            wanted, got = had.entry(parameter, state), has.entry(parameter, state)
            assert wanted is not None and got is not None and got.dtype == wanted.dtype == torch.float32
            tensor = wanted.saved.tensor()
            assert torch.equal(got.saved.tensor().reshape(tensor.shape), tensor), (parameter, state)
            assert tensor.abs().max() > 0
    assert ours.checkpoint.name == "step-00000003" and Checkpoint(ours.checkpoint).values["step"] == 3


@pytest.mark.parametrize("into", [pytest.param(s, marks=() if s == "zero1" else pytest.mark.full) for s in CASES])
@pytest.mark.parametrize("name", ALL)
def test_its_engine_goes_on_with_the_same_losses(name, into, written):
    _, losses, _, back = written(name)
    zero, size = CASES[into]
    outcomes = run_local(size, peer.load, STACK, back.target, zero, timeout=400)
    assert [o.code for o in outcomes] == [0] * size
    print(name, into, losses, outcomes[0].value)
    assert len(losses) == 2 and outcomes[0].value == pytest.approx(losses, rel=1e-6)


def states_of(path):
    """Every tensor of a checkpoint of ours."""
    ours, found = Checkpoint(path), {}
    for name, place in places(ours.run.model).items():
        for state in ("master", "exp_avg", "exp_avg_sq"):
            if f"{state}/{name}" in store.names(path):
                found[f"{state}/{name}"] = torch.empty(place.shape)
    held = {name: Pieces(t.shape, torch.float32, [((0,) * t.dim(), t)]) for name, t in found.items()}
    store.load(path, held)
    return found


OWN = {
    "ours": (STACK, None),
    "megatron's": (stack("a/f", "a/f", norm_eps=1e-5), "megatron"),
    "megatron's hybrid": (stack("m/f", "a/-", "-/e", norm_eps=1e-5), "megatron"),
}
OWN["megatron's"][0]["parts"]["a"] = PARTS["a"] | {"num_kv_heads": 4}


@pytest.mark.parametrize("name", OWN)
def test_a_checkpoint_of_ours_comes_back_as_it_went(name, tmp_path):
    """All of it: what its run needs to go on is kept beside the tensors."""
    tree, names = OWN[name]
    if "hybrid" in name:
        tree["parts"]["a"] = tree["parts"]["a"] | {"qkv_bias": False}
        tree["parts"]["e"] = tree["parts"]["e"] | {"renormalize": True}
    path, _ = save_stack(tree, tmp_path / "run", step=5)
    done = to_universal(path, tmp_path / "there", names)
    again = from_universal(tmp_path / "there", tmp_path / "again")
    assert Checkpoint(path).values == Checkpoint(again.checkpoint).values
    wanted, got = states_of(path), states_of(again.checkpoint)
    assert wanted.keys() == got.keys() and len(wanted) == 3 * len(places(again.model))
    for key, tensor in wanted.items():
        assert torch.equal(tensor, got[key]), key
    assert ("megatron-core" in done.what) == (names is not None)
    written = Folder(tmp_path / "there").names
    assert ("embedding.word_embeddings.weight" in written) == (names is not None)


def test_masters_alone(tmp_path):
    """Of a converted model: its moments are zeros, and no moments come back."""
    path, _ = save_stack(STACK, tmp_path / "run", step=0, moments=False)
    done = to_universal(path, tmp_path / "there")
    assert "they are zeros" in done.notes[0]
    assert not Folder(tmp_path / "there").read("norm.weight", "exp_avg", (32,), (slice(0, 32),)).any()
    (outcome,) = run_local(1, peer.load, STACK, tmp_path / "there", 1, 0, timeout=300)
    assert outcome.code == 0
    for file in (tmp_path / "there").rglob("exp_avg*.pt"):
        file.unlink()
    again = from_universal(tmp_path / "there", tmp_path / "again")
    assert states_of(again.checkpoint).keys() == {f"master/{name}" for name in places(again.model)}


def test_a_tensor_group_takes_its_shares(tmp_path):
    """DeepSpeed's loader, as rank 1 of 2: its share of every segment, as the layout here has it."""
    path, model = save_stack(stack("m/f", "a/e"), tmp_path / "run", step=1)
    to_universal(path, tmp_path / "there")
    place = tmp_path / "there/global_step1/zero"
    outcomes = run_local(1, _shares, place, timeout=300)
    assert outcomes[0].code == 0
    shares = outcomes[0].value
    weights = dict(model.named_parameters())
    q, k, v = weights["layers.1.mixer.qkv.weight"].split([32, 16, 16])
    assert torch.equal(shares["layers.1.mixer.qkv.weight"], torch.cat([q[16:], k[8:], v[8:]]).flatten())
    assert torch.equal(shares["layers.1.mixer.out.weight"], weights["layers.1.mixer.out.weight"][:, 16:].flatten())
    w_in, w_out = weights["layers.1.channel.experts.w_in"], weights["layers.1.channel.experts.w_out"]
    gate, up = w_in.split(16, dim=1)
    assert torch.equal(shares["layers.1.channel.experts.w_in"], torch.cat([gate[:, 8:], up[:, 8:]], 1).flatten())
    assert torch.equal(shares["layers.1.channel.experts.w_out"], w_out[:, :, 8:].flatten())
    assert torch.equal(shares["norm.weight"], weights["norm.weight"])


SHARES = {
    "layers.1.mixer.qkv.weight": (32, 32),
    "layers.1.mixer.out.weight": (32, 16),
    "layers.1.channel.experts.w_in": (3, 16, 32),
    "layers.1.channel.experts.w_out": (3, 32, 8),
    "norm.weight": (32,),
}


def _shares(folder):
    import types

    from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state

    import lamella.parallel.cpu_host  # noqa: F401  # before DeepSpeed

    found = {}
    for name, shape in SHARES.items():
        whole = torch.zeros(shape)
        address = types.SimpleNamespace(start=0, numel=whole.numel())
        flat = torch.zeros(whole.numel())
        mapping = types.SimpleNamespace(lp_fragment_address=address, get_hp_fragment=lambda flat=flat: flat)
        whole._hp_mapping = mapping  # type: ignore[attr-defined]
        load_hp_checkpoint_state(whole, str(folder / name), 1, 2)
        found[name] = flat
    return found


MEGATRON = {
    "gpt": {"num_query_groups": 2, "kv_channels": 6},
    "moe": megatron_peer.MOE | {"moe_layer_freq": [0, 1, 1], "moe_shared_expert_intermediate_size": 16},
    "hybrid": megatron_peer.SCAN | {"pattern": "M*-M"},
}


@pytest.mark.parametrize("name", ["gpt", *(pytest.param(n, marks=pytest.mark.full) for n in ("moe", "hybrid"))])
def test_an_engine_over_a_model_of_megatron_core(name, tmp_path):
    """Its names are of megatron-core's modules; the same model saved by megatron-core says what the tensors are."""
    case = MEGATRON[name]
    outcomes = run_local(1, _megatron, name, case, tmp_path, timeout=400)
    assert outcomes[0].code == 0
    ours = from_universal(tmp_path / "universal", tmp_path / "ours")
    other = from_megatron(tmp_path / "megatron", tmp_path / "other")
    assert ours.model == other.model
    wanted, got = states_of(other.checkpoint), states_of(ours.checkpoint)
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key
    assert len(got) == 3 * len(wanted) and Megatron(tmp_path / "megatron").args
    to_universal(tmp_path / "ours", tmp_path / "back")
    had, has = Folder(tmp_path / "universal"), Folder(tmp_path / "back")
    assert had.names == has.names and all(name.startswith("module.") for name in had.names)
    for parameter in had.names:
        for state in STATES:
            one, two = had.entry(parameter, state), has.entry(parameter, state)
            assert one is not None and two is not None and torch.equal(one.saved.tensor(), two.saved.tensor())


def _megatron(name, case, folder):
    megatron_peer.start()
    from megatron.core import dist_checkpointing

    with megatron_peer.groups():
        model = megatron_peer.build(case).train()
        args = megatron_peer.arguments(case, model)
        tokens = torch.tensor(megatron_peer.TOKENS)
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)

        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.module = model

            def forward(self):
                return self.module(tokens, position, mask)

            def state_dict(self, *words, **more):  # its linear layers put None there, which the converter cannot take
                return {key: t for key, t in super().state_dict(*words, **more).items() if t is not None}

        engine = peer.engine_of(Wrapped())
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(engine().flatten(0, 1)[:-1], tokens.flatten()[1:])
            engine.backward(loss)
            engine.step()
        peer.save(engine, folder, 2, {"args": args})
        (folder / "megatron").mkdir()
        state = {"args": args, "iteration": 2, "model": model.sharded_state_dict()}
        dist_checkpointing.save(state, str(folder / "megatron"))


@pytest.fixture
def theirs(written, tmp_path):
    return shutil.copytree(written("zero1")[0], tmp_path / "theirs")


class Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


def saved(file, value):
    def write(folder):
        (folder / "step" / file).parent.mkdir(exist_ok=True, parents=True)
        torch.save(value, folder / "step" / file)

    return write


def gone(*files):
    def remove(folder):
        for file in files:
            path = folder / file
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def cut(folder):
    file = folder / "step/zero/norm.weight/exp_avg.pt"
    file.write_bytes(file.read_bytes()[:-40])


def model(**more):
    return lambda folder: (folder / "model.yaml").write_text(yaml.safe_dump(STACK | more))


STATES_FILE = "mp_rank_00_model_states.pt"
WRONG = {
    "nothing named": (lambda f: (f / "latest_universal").write_text("../x"), "names '../x'"),
    "no states": (gone(f"step/{STATES_FILE}"), "lacks *model_states.pt"),
    "states that run": (saved(STATES_FILE, {"x": Runs()}), "system, which is never loaded"),
    "a piece that runs": (saved("zero/norm.weight/fp32.pt", {"param": Runs()}), "system, which is never loaded"),
    "no tensor": (saved("zero/norm.weight/fp32.pt", {"param": 3}), "holds no tensor"),
    "whole numbers": (saved("zero/norm.weight/fp32.pt", {"param": torch.ones(32, dtype=torch.int64)}), "torch.int64"),
    "another shape": (saved("zero/norm.weight/fp32.pt", {"param": torch.ones(31)}), "by its model it must be [32]"),
    "another moment": (saved("zero/norm.weight/exp_avg.pt", torch.ones(31)), "is [31]"),
    "a parameter missing": (gone("step/zero/norm.weight"), "lacks norm.weight"),
    "a master missing": (gone("step/zero/norm.weight/fp32.pt"), "lacks norm.weight"),
    "a parameter left over": (saved("zero/more/fp32.pt", {"param": torch.ones(1)}), "more has no place"),
    "a cut piece": (cut, "damaged"),
    "nothing of the model": (gone("model.yaml"), "says nothing of its model; put the model part"),
    "another model": (model(d_model=48), "by its model it must be"),
    "a model that is none": (model(parts={"m": {"mixer": "none"}}), "no mixer 'none'"),
    "other names": (lambda f: (f / "step/zero/embedding.weight").rename(f / "step/zero/wte"), "has neither"),
    "a tied head that differs": (saved("zero/head.weight/fp32.pt", {"param": torch.ones(50, 32)}), "they are tied"),
    "a step that is none": (lambda f: [torch.save("x", p) for p in f.rglob("step.pt")], "its step is no whole number"),
}


@pytest.mark.parametrize(("spoil", "text"), WRONG.values(), ids=WRONG)
def test_a_folder_that_is_wrong(spoil, text, theirs, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(theirs)
    assert call("convert", theirs, tmp_path / "ours", "--to", "lamella") == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("lamella: ") and text in said[0], said
    assert [f.name for f in tmp_path.iterdir()] == ["theirs"]


def test_a_parameter_that_never_had_a_gradient(theirs, tmp_path):
    """DeepSpeed's converter writes its value alone."""
    gone(*(f"step/zero/norm.weight/{state}.pt" for state in ("exp_avg", "exp_avg_sq", "step")))(theirs)
    found = states_of(from_universal(theirs, tmp_path / "ours").checkpoint)
    assert not found["exp_avg/norm.weight"].any() and found["exp_avg/embedding.weight"].any()


def test_the_command(theirs, tmp_path, capfd):
    assert call("convert", theirs, tmp_path / "ours", "--to", "lamella") == 0
    assert "masters and moments of step 3" in capfd.readouterr().out
    assert call("convert", tmp_path / "ours", tmp_path / "there", "--to", "universal") == 0
    assert (tmp_path / "there/latest_universal").read_text() == "global_step3"
    assert call("convert", tmp_path / "ours/checkpoints/step-00000003", tmp_path / "x", "--to", "megatron") == 2
    assert "layer 2 (j/-): megatron's hybrid has mamba2 or attention" in capfd.readouterr().err
    assert call("convert", tmp_path / "ours", tmp_path / "x", "--to", "universal", "--family", "hf") == 2
    assert "--family hf: parameters of a universal folder" in capfd.readouterr().err
    assert call("convert", tmp_path, tmp_path / "x", "--to", "universal") == 2
    assert "no checkpoint there" in capfd.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ours", "theirs", "there"]


@pytest.mark.parametrize("to", ["megatron", "universal"])
def test_a_full_disk_leaves_nothing(to, tmp_path, monkeypatch):
    tree = stack("a/f", norm_eps=1e-5)
    path, _ = save_stack(tree, tmp_path / "run", step=1)
    before = sorted(file.name for file in tmp_path.rglob("*"))
    written = []

    def full(*words):
        written.append(words)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*words)

    module = importlib.import_module(f"lamella.convert.{to}.write")
    save = module._append if to == "megatron" else module._save
    monkeypatch.setattr(module, "_append" if to == "megatron" else "_save", full)
    make = to_megatron if to == "megatron" else to_universal
    with pytest.raises(UserError, match=r"x: cannot be written .No space left"):
        make(path, tmp_path / "x")
    assert len(written) == 3 and sorted(file.name for file in tmp_path.rglob("*")) == before


def test_what_is_written_holds_no_class_but_plain_ones(tmp_path):
    """It can be read without executing anything, too: a mistake there would be refused here."""
    path, _ = save_stack(stack("a/f"), tmp_path / "run", step=1)
    to_universal(path, tmp_path / "there")
    whole = torch.load(tmp_path / "there/global_step1" / STATES_FILE, weights_only=True)
    assert whole["global_steps"] == 1 and isinstance(whole["lamella"], str)
    assert ModelConfig.model_validate(yaml.safe_load((tmp_path / "there/model.yaml").read_text()), strict=False)
    assert io.BytesIO((tmp_path / "there/global_step1/zero/optimizer_state.pt").read_bytes()).read(2) == b"PK"
