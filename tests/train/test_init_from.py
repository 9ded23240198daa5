"""A new run that begins with another one's weights: the same model, or with MLPs made experts; or a published one's."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from lamella.checkpoint import series, store
from lamella.config import change, dump, load_run
from lamella.convert.convert import to_hf, to_lamella
from lamella.convert.origin import opened
from lamella.data.store.manifest import read_manifest
from lamella.errors import UserError
from lamella.model.init import generator, initialize
from lamella.model.lm import LanguageModel
from lamella.nn.shard import placed_parameters
from lamella.parallel.local import exit_code, run_local
from lamella.train import loop
from lamella.train.balance import Balance
from lamella.train.init_from import fill, find_start
from lamella.train.restore import load_model
from tests.commands import call
from tests.convert.pth_files import seven, weights_of, write
from tests.corpus import tiny_run
from tests.nn.building import packed, relative
from tests.train.states import assert_equal, history, whole_state
from tests.train.untrained import save_untrained
from tests.train.workers import train_and_strike

DENSE, SPARSE = ["mamba/mlp", "attention/mlp"], ["mamba/moe", "attention/mlp"]
MOE = {"channel": "moe", "num_experts": 4, "top_k": 2, "d_ff": 48, "renormalize": True}


def mlp(d_ff, **options):
    return {"mlp": {"channel": "mlp", "d_ff": d_ff} | options}


def moe(**options):
    return {"moe": MOE | options}


def run_of(corpus, runs, name, layers, init_from=None, parts=None, model=None, **layout):
    """The tiny run with other layers, the options of parts and the model's sizes changed."""
    config = tiny_run(corpus, runs, name=name, **layout)
    tree = config.model.model_dump(mode="json") | {"stack": [{"layers": layers}]} | (model or {})
    tree["parts"] |= {"moe": MOE} | (parts or {})
    begin = {"init_from": None if init_from is None else str(init_from)}
    return change(config, model=tree, train=config.train.model_dump(mode="json") | begin)


def find(config):
    return find_start(config, read_manifest(Path(config.data.path)).tokenizer, opened)


def begun(config):
    """On one process: the model of a run with `init_from`, and what its routers keep."""
    model = LanguageModel(config.model)
    initialize(model, config.train.seed)
    balance = Balance(config.model, model)
    fill(find(config), model, balance)
    return model, balance


def logits(model):
    tokens = torch.randint(500, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens, packed([[24], [9, 15]]))


EXACT = [
    ("swiglu", {}),
    ("geglu", {"top_k": 3}),
    ("gelu", {"top_k": 1}),
    ("relu", {"top_k": 4, "renormalize": False}),  # all of them: together their chances are 1
    ("relu2", {"bias_rate": 0.1}),
]


@pytest.mark.parametrize(("activation", "options"), EXACT, ids=[name for name, _ in EXACT])
def test_experts_that_are_the_mlp_compute_what_it_computed(activation, options, corpus, tmp_path):
    path, dense = save_untrained(run_of(corpus, tmp_path, "dense", DENSE, parts=mlp(48, activation=activation)))
    parts = mlp(48, activation=activation) | moe(activation=activation, **options)
    model, _ = begun(run_of(corpus, tmp_path, "sparse", SPARSE, path, parts))
    assert relative(logits(model), logits(dense)) < 1e-6
    experts, one = model.layers["0"].channel.experts, dense.layers["0"].channel
    assert all(torch.equal(w, one.w_in.weight) for w in experts.w_in)
    assert all(torch.equal(w, one.w_out.weight) for w in experts.w_out)


def test_weights_that_do_not_sum_to_one_scale_the_branch(corpus, tmp_path):
    """What the guide says of Switch: the branch is the MLP's times the chance of the chosen expert."""
    path, dense = save_untrained(run_of(corpus, tmp_path, "dense", DENSE))
    model, _ = begun(run_of(corpus, tmp_path, "sparse", SPARSE, path, moe(top_k=1, renormalize=False)))
    x, rows = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)), packed([[6]])
    new, old = model.layers["0"].channel, dense.layers["0"].channel
    with torch.no_grad():
        chance = (x @ new.router.weight.t()).softmax(-1).amax(-1, keepdim=True)
        assert chance.min() > 0.25 and chance.max() < 0.5
        assert relative(new(x, rows), chance * old(x, rows)) < 1e-6


def test_the_same_model_goes_on_with_its_routers_biases(corpus, tmp_path):
    """They are part of what it computes. A run's folder means its newest checkpoint."""
    biased = moe(bias_rate=0.1)
    old = run_of(corpus, tmp_path, "old", SPARSE, parts=biased)
    kept = {"layer0/channel": {"load": [0.1, 0.2, 0.3, 0.4], "bias": [0.5, -0.5, 0.25, 0.0]}}
    save_untrained(old, step=2)
    _, model = save_untrained(old, step=3, routers=kept)
    Balance(old.model, model).restore(kept)
    again, balance = begun(run_of(corpus, tmp_path, "again", SPARSE, old.folder, biased))
    assert balance.state == kept
    assert torch.equal(logits(again), logits(model))


@pytest.fixture(scope="module")
def dense(corpus, tmp_path_factory):
    return save_untrained(run_of(corpus, tmp_path_factory.mktemp("dense"), "dense", DENSE))


REFUSED = {
    "another vocabulary": (DENSE, {}, {"vocab_size": 520}, ["embedding.weight is [512, 32]", "model.vocab_size=512"]),
    "another width": (DENSE, mlp(64), {}, ["layers.0.channel.w_in.weight is [96, 32]", "must be [128, 32]"]),
    "narrow experts": (SPARSE, moe(d_ff=32), {}, ["layers.0.channel.experts.w_in", "the mlp's d_ff=48"]),
    "another activation": (SPARSE, moe(activation="gelu"), {}, ["layers.0.channel", "set activation=swiglu"]),
    "a shared expert": (SPARSE, moe(shared_d_ff=48), {}, ["channel.shared_in.weight", "leave out shared_d_ff"]),
    "another mixer": (["attention/mlp", "attention/mlp"], {}, {}, ["has no layers.0.mixer.qkv.weight"]),
    "one layer less": (DENSE[:1], {}, {}, ["layers.1.mixer_norm.weight has no place"]),
    "tied": (DENSE, {}, {"tie_embeddings": True}, ["head.weight has no place"]),
}


@pytest.mark.parametrize(("layers", "parts", "model", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_begin_so_is_refused(layers, parts, model, said, corpus, tmp_path, dense):
    with pytest.raises(UserError) as refused:
        find(run_of(corpus, tmp_path, "new", layers, dense[0], parts, model))
    line = str(refused.value)
    assert [text for text in [str(dense[0]), *said] if text not in line] == [] and "\n" not in line


def test_experts_become_no_mlp(corpus, tmp_path):
    path, _ = save_untrained(run_of(corpus, tmp_path, "sparse", SPARSE))
    with pytest.raises(UserError, match=r"has no layers\.0\.channel\.w_in\.weight"):
        find(run_of(corpus, tmp_path, "dense", DENSE, path))


def test_another_tokenizer_is_refused(corpus, tmp_path):
    path, _ = save_untrained(run_of(corpus, tmp_path, "old", DENSE), tokenizer="another")
    with pytest.raises(UserError, match="another tokenizer"):
        find(run_of(corpus, tmp_path, "new", DENSE, path))


LAYOUTS = [
    (1, {}),
    (2, {"expert": 2}),
    (2, {"tensor": 2}),
    pytest.param(2, {"pipeline": 2}, marks=pytest.mark.full),
    pytest.param(2, {"zero": 3}, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("nproc", "layout"), LAYOUTS, ids=lambda v: str(v).replace(" ", ""))
def test_every_layout_begins_with_the_same_masters(nproc, layout, corpus, tmp_path, dense):
    path, old = dense
    config = run_of(corpus, tmp_path, "sparse", SPARSE, path, **layout)
    state, ranks = whole_state(config, nproc)
    assert [step for _, _, _, step in ranks] == [0] * nproc
    there, wanted = dict(old.named_parameters()), {}
    for name, parameter in placed_parameters(LanguageModel(config.model)):
        source = name.replace("experts.w_in", "w_in.weight").replace("experts.w_out", "w_out.weight")
        if source in there:
            wanted[f"master/{name}"] = there[source].data.expand(parameter.place.shape)
        else:
            assert name == "layers.0.channel.router.weight"
            wanted[f"master/{name}"] = parameter.place.init(generator(name, 7), parameter.place.shape)
    assert_equal(state, wanted)


def test_killed_and_continued_from_its_own_checkpoint(corpus, tmp_path):
    """The first weights' folder may be gone by then; that they came from there stays on record."""
    old = run_of(corpus, tmp_path, "old", DENSE)
    path, _ = save_untrained(old)
    whole, struck = (run_of(corpus, tmp_path, name, SPARSE, old.folder) for name in ("whole", "struck"))
    assert exit_code(run_local(2, loop.enter, whole, timeout=120)) == 0
    assert exit_code(run_local(2, train_and_strike, struck, 1, 3, signal.SIGKILL, timeout=120)) == 1
    shutil.rmtree(old.folder)
    assert exit_code(run_local(2, loop.enter, struck, timeout=120)) == 0
    assert history(struck) == history(whole)
    for config in (whole, struck):
        assert load_run(config.folder / "config.yaml").train.init_from == str(path)
        newest = series.latest(config.folder / "checkpoints")
        assert store.read_values(newest)["config"]["train"]["init_from"] == str(path)


LLAMA = ["attention/mlp"] * 2
LAYERED = {"norm": "layer", "norm_eps": 1e-5, "embedding_norm": True}
SIX = {"t": {"mixer": "rwkv6", "head_size": 8, "mix_rank": 3, "decay_rank": 5, "group_eps": 1e-5}}
SIX |= {"c": {"channel": "rwkv", "version": 6, "d_ff": 24}}
SEVEN = {"t": {"mixer": "rwkv7", "head_size": 8, "decay_rank": 5, "rate_rank": 3, "value_rank": 2, "gate_rank": 6}}
SEVEN |= {"c": {"channel": "rwkv", "d_ff": 20}}


@pytest.fixture(scope="module")
def published(corpus, tmp_path_factory):
    """Folders of Hugging Face's, and a file of RWKV's; of each the run that has its model, and its weights here."""
    home = tmp_path_factory.mktemp("published")
    path, model = save_untrained(run_of(corpus, home, "llama", LLAMA))
    to_hf(path, home / "llama-folder")
    found = {"llama-folder": (LLAMA, {}, {}, model)}
    path, model = save_untrained(run_of(corpus, home, "six", ["t/c"] * 2, parts=SIX, model=LAYERED))
    to_hf(path, home / "rwkv6-folder")
    found["rwkv6-folder"] = (["t/c"] * 2, SIX, LAYERED, model)
    file = write(home / "rwkv7.pth", weights_of(seven(V=512, layers=2), torch.bfloat16))
    done = to_lamella(file, home / "seven")
    again = load_model(done.checkpoint, done.model, torch.float32)
    found["rwkv7.pth"] = (["t/c"] * 2, SEVEN, LAYERED, again)
    return home, found


WAYS = [
    ("llama-folder", 1, {}),
    ("rwkv6-folder", 2, {"tensor": 2}),
    ("rwkv7.pth", 2, {"pipeline": 2}),
    pytest.param("llama-folder", 2, {"tensor": 2, "sequence_parallel": True}, marks=pytest.mark.full),
    pytest.param("llama-folder", 2, {"zero": 3}, marks=pytest.mark.full),
    pytest.param("rwkv7.pth", 4, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.full),
    pytest.param("rwkv6-folder", 2, {"zero": 2}, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "nproc", "layout"), WAYS, ids=lambda v: str(v).replace(" ", ""))
def test_a_published_model_is_read_where_it_lies(name, nproc, layout, corpus, tmp_path, published):
    """The masters are its weights, in every layout; nothing is written but the run."""
    home, found = published
    layers, parts, model, weights = found[name]
    config = run_of(corpus, tmp_path, "new", layers, f"hf:{home / name}", parts, model, **layout)
    state, ranks = whole_state(config, nproc, opened)
    assert [step for _, _, _, step in ranks] == [0] * nproc
    assert_equal(state, {f"master/{key}": parameter.data.cpu() for key, parameter in weights.named_parameters()})
    assert [f.name for f in tmp_path.iterdir()] == ["new"]


def test_it_trains_as_from_the_checkpoint_and_goes_on_without_the_folder(corpus, tmp_path):
    """fp32 both times: the same losses, bit for bit."""
    path, _ = save_untrained(run_of(corpus, tmp_path, "old", LLAMA))
    to_hf(path, tmp_path / "there")
    first, second = (
        run_of(corpus, tmp_path, name, LLAMA, begin)
        for name, begin in (("first", path), ("second", f"hf:{tmp_path / 'there'}"))
    )
    for config in (first, second):
        assert exit_code(run_local(1, loop.enter, config, opened, timeout=120)) == 0
    assert history(second) == history(first)
    shutil.rmtree(tmp_path / "there")
    longer = change(second, train=second.train.model_dump(mode="json") | {"steps": second.train.steps + 1})
    assert exit_code(run_local(1, loop.enter, longer, opened, timeout=120)) == 0
    assert load_run(second.folder / "config.yaml").train.init_from == f"hf:{tmp_path / 'there'}"


UNLIKE = {
    "a width": (LLAMA, mlp(64), {}, ["is a llama with intermediate_size=48, and this run's model has 64"]),
    "an epsilon": (LLAMA, {}, {"norm_eps": 1e-3}, ["rms_norm_eps=1e-06, and this run's model has 0.001"]),
    "a vocabulary": (LLAMA, {}, {"vocab_size": 520}, ["vocab_size=512, and this run's model has 520"]),
    "tied": (LLAMA, {}, {"tie_embeddings": True}, ["tie_word_embeddings=False, and this run's model has True"]),
    "a layer more": (LLAMA * 2, {}, {}, ["num_hidden_layers=2, and this run's model has 4"]),
    "experts": (["attention/moe"] * 2, {}, {}, ["is no llama: layer 0 (attention/moe): llama has mlp there"]),
    "another norm": (LLAMA, {}, {"norm": "layer"}, ["this run's model is no llama: model.norm=layer"]),
}


@pytest.mark.parametrize(("layers", "parts", "model", "said"), UNLIKE.values(), ids=UNLIKE)
def test_a_model_that_is_not_the_published_one_is_refused_by_its_key(
    layers, parts, model, said, corpus, tmp_path, published
):
    where = f"hf:{published[0] / 'llama-folder'}"
    with pytest.raises(UserError) as refused:
        find(run_of(corpus, tmp_path, "new", layers, where, parts, model))
    line = str(refused.value)
    assert [text for text in [where, *said] if text not in line] == [] and "\n" not in line


def test_what_trains_only_may_differ(corpus, tmp_path, published):
    where = f"hf:{published[0] / 'llama-folder'}"
    find(run_of(corpus, tmp_path, "new", LLAMA, where, {}, {"dropout": 0.1, "init_std": 0.5}))


def test_wrong_folders(corpus, tmp_path, published):
    home, _ = published
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(home / "llama-folder", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"PK" * 50)
    for where, text in [
        (f"hf:{tmp_path / 'nowhere'}", "no such folder"),
        (f"hf:{tmp_path / 'empty'}", "has no config.json"),
        (f"hf:{damaged}", "damaged"),
        (home / "llama-folder", f"write train.init_from=hf:{home / 'llama-folder'}"),
    ]:
        with pytest.raises(UserError, match=re.escape(text)) as refused:
            find(run_of(corpus, tmp_path, "new", LLAMA, where))
        assert "\n" not in str(refused.value)


def test_its_tokenizer_must_be_the_data_s(corpus, tmp_path, published):
    """Where the folder has one that is known here."""
    folder = shutil.copytree(published[0] / "llama-folder", tmp_path / "there")
    config = run_of(corpus, tmp_path, "new", LLAMA, f"hf:{folder}")
    shutil.copyfile(Path(config.data.path) / "tokenizer.model", folder / "tokenizer.model")
    assert find(config).origin.tokenizers == {read_manifest(Path(config.data.path)).tokenizer}
    with pytest.raises(UserError, match="another tokenizer"):
        find_start(config, "another", opened)


def test_the_command_takes_it(corpus, tmp_path, published, capfd):
    config = run_of(corpus, tmp_path, "new", LLAMA)
    file = tmp_path / "run.yaml"
    dump(config, file)
    begin = f"train.init_from=hf:{published[0] / 'llama-folder'}"
    assert call("train", file, "--nproc", 1, "--dry-run", begin) == 0
    assert call("train", file, "--nproc", 1, "--dry-run", begin, "model.norm_eps=0.5") == 2
    assert "rms_norm_eps=1e-06, and this run's model has 0.5" in capfd.readouterr().err
