"""BlinkDL's RWKV-6 and RWKV-7 .pth: in, with every tensor in its place and the equations' logits; out as fla's."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from lamella.convert.convert import to_hf, to_lamella
from lamella.convert.family import Misfit, family
from lamella.convert.map import links, places
from lamella.errors import UserError
from lamella.train.restore import load_model
from tests.commands import call
from tests.convert import forms
from tests.convert.models import config_of
from tests.convert.pth_files import seven, six, weights_of, write
from tests.convert.test_fla import worst

FILES = {
    "6": six(),
    "6, one layer": six(layers=1, V=37),
    "6, one head": six(D=24, size=24, mix=1, decay=1),
    "6, many heads": six(size=4, F=112, layers=2),
    "6, odd ranks": six(D=16, mix=7, decay=9, size=2),
    "7": seven(),
    "7, unused values": seven(unused=True, layers=2),
    "7, one layer": seven(layers=1, V=37, F=128),
    "7, one head": seven(D=24, size=24, ranks=(1, 1, 1, 1)),
    "7, odd ranks": seven(D=16, size=4, ranks=(9, 2, 7, 17), layers=4),
}


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_in_its_place_and_the_logits_are_those_of_the_equations(name, tmp_path):
    weights = weights_of(FILES[name])
    ours = to_lamella(write(tmp_path / "rwkv.pth", weights), tmp_path / "ours")
    kind = family(f"rwkv{name[0]}_pth")
    assert ours.family.name == kind.name and kind.write(ours.model, 64) == {"pth": kind.name} | ours_sizes(FILES[name])
    model = load_model(ours.checkpoint, ours.model, torch.float32)
    parameters, seen = dict(model.cpu().named_parameters()), set()
    for link in links(places(ours.model), kind.table, kind.layers(ours.model), kind.name):
        seen.add(link.theirs)
        assert torch.equal(link.to_theirs(parameters[link.ours]), weights[link.theirs]), link
    assert weights.keys() - seen == {n for n in weights if n.startswith("blocks.0.att.v") and n[-1] in "012"}
    difference = worst(ours.checkpoint, ours.model, lambda tokens: forms.pth(weights, tokens))
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-5


def ours_sizes(shapes):
    """What the file says, by other names than those that are read."""
    layers = len({n.split(".")[1] for n in shapes if n.startswith("blocks")})
    sizes = {"vocab_size": shapes["head.weight"][0], "d_model": shapes["ln_out.bias"][0], "num_layers": layers}
    sizes["d_ff"] = shapes["blocks.0.ffn.value.weight"][1]
    if "blocks.0.att.r_k" not in shapes:
        sizes["head_size"] = shapes["blocks.0.att.time_faaaa"][1]
        sizes["mix_rank"] = shapes["blocks.0.att.time_maa_w1"][1] // 5
        return sizes | {"decay_rank": shapes["blocks.0.att.time_decay_w2"][0]}
    low = {"decay": "w", "rate": "a", "gate": "g"}
    sizes |= {"head_size": shapes["blocks.0.att.r_k"][1], "value_rank": shapes.get("blocks.1.att.v2", (1,))[0]}
    return sizes | {f"{ours}_rank": shapes[f"blocks.0.att.{n}2"][0] for ours, n in low.items()}


def test_rwkv_7_goes_on_to_fla_s_folder(tmp_path):
    """With heads of 64 its epsilons are fla's. In bf16, as published."""
    weights = weights_of(seven(D=128, size=64, layers=2), torch.bfloat16)
    to_lamella(write(tmp_path / "rwkv.pth", weights), tmp_path / "ours")
    back = to_hf(tmp_path / "ours", tmp_path / "fla")
    assert back.family.name == "rwkv7" and back.dtype == torch.bfloat16
    tensors, config = load_file(tmp_path / "fla/model.safetensors"), config_of(tmp_path / "fla")
    assert torch.equal(tensors["model.layers.1.attn.w_lora.lora.0.weight"], weights["blocks.1.att.w1"].T)
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    far = forms.fla(config, tensors, tokens) - forms.pth(weights, tokens)
    assert far.abs().max() < 1e-12


def test_rwkv_6_does_not_for_its_group_norm_has_another_epsilon(tmp_path):
    to_lamella(write(tmp_path / "rwkv.pth", weights_of(six())), tmp_path / "ours")
    with pytest.raises(Misfit, match=r"layer 0 .*group_eps=0\.00064, and rwkv6 has one norm_eps=1e-05"):
        to_hf(tmp_path / "ours", tmp_path / "fla")
    for name in ("rwkv6_pth", "rwkv7_pth"):
        with pytest.raises(UserError, match=f"--family {name}: is read, never written"):
            to_hf(tmp_path / "ours", tmp_path / "pth", name=name)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ours", "rwkv.pth"]


def test_the_command_reads_a_file_and_says_what_was_not_compared(tmp_path, capfd):
    file = write(tmp_path / "rwkv.pth", weights_of(seven()))
    assert call("convert", file, tmp_path / "ours", "--to", "lamella") == 0
    out = capfd.readouterr().out
    assert "rwkv7_pth, float32 weights, every tensor in its place" in out
    assert "logits not compared: no program is at hand that runs this file" in out
    assert call("convert", file, tmp_path / "other", "--to", "hf") == 2


def refused(file, tmp_path) -> str:
    """The one line that the command says; nothing is left behind."""
    with pytest.raises(UserError) as error:
        to_lamella(file, tmp_path / "ours")
    line = str(error.value)
    assert "\n" not in line and line.startswith(str(file)) and not list(tmp_path.glob("ours*"))
    return line


def older(version):
    """RWKV-4 and 5 have neither r_k nor time_maa_w1."""
    shapes = {n: s for n, s in six().items() if "maa" not in n}
    names = {4: ("time_first", "time_mix_k"), 5: ("time_mix_g", "time_mix_k")}[version]
    return shapes | {f"blocks.{layer}.att.{n}": (1, 1, 32) for n in names for layer in range(3)}


WRONG = {
    "RWKV-4": (older(4), "neither blocks.0.att.time_maa_w1 nor blocks.0.att.r_k, so it is no RWKV-6 and no RWKV-7"),
    "RWKV-5": (older(5), "neither blocks.0.att.time_maa_w1 nor"),
    "a variant of 6": (six() | {"blocks.0.att.time_decay_w3": (3, 3)}, "blocks.0.att.time_decay_w3 has no place"),
    "a variant of 7": (seven() | {"blocks.1.ffn.s_emb": (50, 8)}, "blocks.1.ffn.s_emb has no place"),
    "a tensor missing": ({n: s for n, s in seven().items() if n != "blocks.2.att.k_k"}, "lacks blocks.2.att.k_k"),
    "a size missing": ({n: s for n, s in six().items() if n != "emb.weight"}, "lacks emb.weight"),
    "a layer missing": ({n: s for n, s in six().items() if "blocks.1." not in n}, "lacks blocks.1."),
    "a layer too far": (six() | {"blocks.99999999999.more.x": (1,)}, "lacks blocks.3."),
    "another shape": (six() | {"blocks.2.att.output.weight": (32, 31)}, "is [32, 31], by its own sizes it must be [32"),
    "a vector for a matrix": (six() | {"blocks.0.att.time_faaaa": ()}, "blocks.0.att.time_faaaa is []"),
    "a width of 0": (seven() | {"emb.weight": (50, 0)}, "emb.weight is [50, 0]"),
    "heads that do not divide": (six() | {"blocks.0.att.time_faaaa": (4, 5)}, "head_size=5"),
}


@pytest.mark.parametrize(("shapes", "text"), WRONG.values(), ids=WRONG)
def test_another_model_is_refused_by_what_it_lacks_or_has_more(shapes, text, tmp_path):
    assert text in refused(write(tmp_path / "rwkv.pth", weights_of(shapes)), tmp_path)


class Strike:
    """Runs a command wherever it is unpickled without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["a value", "the whole", "a key's value inside", "an old file"])
def test_a_foreign_pickle_is_refused_by_name_and_nothing_runs(where, tmp_path):
    mark, file = tmp_path / "struck", tmp_path / "rwkv.pth"
    weights = weights_of(six())
    if where == "an old file":  # without the archive around it
        file.write_bytes(pickle.dumps(weights | {"more": Strike(mark)}))
        assert "damaged or no weights" in refused(file, tmp_path)
    else:
        struck = {"a value": weights | {"more": Strike(mark)}, "the whole": Strike(mark)}
        write(file, struck.get(where, weights | {"more": {"deeper": [Strike(mark)]}}))
        name = f"{os.system.__module__}.system"
        assert f"holds more than tensors, which is never loaded ({name})" in refused(file, tmp_path)
    assert not mark.exists()
    if where == "the whole":  # it would have
        torch.load(file, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize("held", [[1, 2], {"a": 3}, {3: torch.ones(1)}, {"a": {"b": torch.ones(1)}}], ids=str)
def test_what_is_no_mapping_of_tensors_is_refused(held, tmp_path):
    assert "no mapping of names to tensors" in refused(write(tmp_path / "rwkv.pth", held), tmp_path)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.full) for n in range(4, 60))])
def test_a_damaged_file_is_refused_or_whole(seed, tmp_path):
    """A byte flipped, a stretch of zeros, cut off, a piece twice: one line, or every tensor as it was."""
    draw, weights = random.Random(seed), weights_of(seven() if seed % 2 else six())
    file = write(tmp_path / "rwkv.pth", weights)
    raw = bytearray(file.read_bytes())
    at = draw.randrange(len(raw))
    kind = draw.choice(["flip", "zeros", "cut", "twice"])
    if kind == "flip":
        raw[at] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    else:
        raw = raw[:at] + (raw[at - 100 :] if kind == "twice" and at > 100 else b"")
    file.write_bytes(raw)
    try:
        ours = to_lamella(file, tmp_path / "ours")
    except UserError as error:
        assert "\n" not in str(error) and str(file) in str(error) and not list(tmp_path.glob("ours*"))
        return
    model = load_model(ours.checkpoint, ours.model, torch.float32)
    parameters = dict(model.cpu().named_parameters())
    for link in links(places(ours.model), ours.family.table, ours.family.layers(ours.model), "it"):
        assert torch.equal(link.to_theirs(parameters[link.ours]), weights[link.theirs]), (kind, at, link)


def test_a_flipped_byte_of_a_tensor_is_found(tmp_path):
    file = write(tmp_path / "rwkv.pth", weights_of(six()))
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    raw = bytearray(file.read_bytes())
    raw[entry.header_offset + 200] ^= 1
    file.write_bytes(raw)
    assert f"{entry.filename} inside it differs from its checksum" in refused(file, tmp_path)
