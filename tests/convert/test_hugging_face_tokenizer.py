"""A run on a tokenizer.json, from the text to Hugging Face's folder and back."""

import json
import shutil
import sysconfig
import warnings

import pytest

from lamella.config import DataConfig, change, dump
from lamella.convert.convert import to_hf, to_lamella
from lamella.convert.origin import opened
from lamella.data.prepare.prepare import prepare
from lamella.data.tokenizer import read_model
from lamella.model.generate import GREEDY, generate
from lamella.train.init_from import find_start
from lamella.train.restore import restore
from tests.commands import call
from tests.convert.models import config_of
from tests.convert.test_tokenizers import JAMBA, greedy
from tests.corpus import prepare_corpus, tiny_run
from tests.data.tokenizer import small
from tests.train.untrained import save_untrained

END = "</s>"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return small.save(small.byte_level(), tmp_path_factory.mktemp("given"), eos_token=END, model_max_length=64)


@pytest.fixture(scope="module")
def data(given, tmp_path_factory):
    folder, library = tmp_path_factory.mktemp("data"), sysconfig.get_path("stdlib")
    sources = [{"format": "text", "path": f"{library}/{name}/*.py"} for name in ("json", "asyncio")]
    tree = {"path": str(folder / "prepared"), "sources": sources, "tokenizer": {"model": str(given)}, "heldout": 0.2}
    config = DataConfig.model_validate(tree, strict=False)
    prepare(config)
    return config


def test_from_text_to_hugging_face_and_back(given, data, tmp_path, capfd):
    run = tiny_run(data, tmp_path / "runs")
    train = run.train.model_dump(mode="json") | {"steps": 2}
    run = change(run, model=run.model.model_dump(mode="json") | JAMBA, train=train)
    dump(run, tmp_path / "run.yaml")
    assert call("train", tmp_path / "run.yaml", "--nproc", 1) == 0
    capfd.readouterr()

    said, err = greedy(run.folder, capfd)
    ours = restore(run.folder)
    ids = ours.tokenizer.encode("def main(x):\n    return ")
    out = generate(ours.model, [ids], ours.tokenizer.eod, ours.tokenizer.vocab_size, 12, GREEDY)[0]
    assert (said, err) == (ours.tokenizer.decode(out), "")
    assert ours.tokenizer.fingerprint == read_model(given).fingerprint
    assert call("eval", run.folder, "--json") == 0
    assert json.loads(capfd.readouterr().out)

    theirs = to_hf(run.folder, tmp_path / "theirs").theirs
    assert {f.name for f in theirs.iterdir() if "tokenizer" in f.name} == {"tokenizer.json", "tokenizer_config.json"}
    assert config_of(theirs)["eos_token_id"] == ours.tokenizer.eod
    back = to_lamella(theirs, tmp_path / "back")
    assert back.notes == () and greedy(tmp_path / "back", capfd) == (said, "")
    assert (tmp_path / "back/hf/tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    start = change(run, train=train | {"init_from": str(tmp_path / "back")})
    assert find_start(start, ours.tokenizer.fingerprint).origin.tokenizers == {ours.tokenizer.fingerprint}


@pytest.fixture
def saved(data, tmp_path):
    home = shutil.copytree(data.path, tmp_path / "home")
    run = tiny_run(change(data, path=str(home)), tmp_path / "runs")
    save_untrained(change(run, model=run.model.model_dump(mode="json") | JAMBA))
    return run.folder, home


def test_where_the_data_s_is_gone(saved, given, capfd):
    folder, home = saved
    wanted = greedy(folder, capfd)
    (home / "tokenizer.json").rename(home / "away.json")
    assert call("generate", folder, "--prompt", "a") == 2
    assert f"{home / 'tokenizer.json'}: missing; give" in capfd.readouterr().err
    for file in (given, given / "tokenizer.json", home / "away.json"):
        assert greedy(folder, capfd, "--tokenizer", file) == wanted
    (home / "tokenizer_config.json").write_text(json.dumps({"eos_token": small.LATE}))
    assert call("generate", folder, "--prompt", "a", "--tokenizer", home / "away.json") == 2
    assert "away.json: not the tokenizer of" in capfd.readouterr().err


@pytest.mark.full
@pytest.mark.peer
def test_transformers_reads_what_goes_out(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = saved
    theirs, ours = to_hf(folder, tmp_path / "theirs").theirs, restore(folder).tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = transformers.AutoTokenizer.from_pretrained(theirs)
    assert peer.eos_token_id == ours.eod
    for text in small.corpus():
        assert peer.encode(text, split_special_tokens=True) == ours.encode(text)


@pytest.mark.full
def test_a_published_model_s_own_files_are_kept(saved, given, tmp_path, capfd):
    """tokenizer.json goes before tokenizer.model, the end piece comes from the files that it came with."""
    folder, _ = saved
    theirs = to_hf(folder, tmp_path / "theirs").theirs
    for file in given.iterdir():
        shutil.copyfile(file, theirs / file.name)
    spare = prepare_corpus(tmp_path)
    shutil.copyfile(f"{spare.path}/tokenizer.model", theirs / "tokenizer.model")
    assert to_lamella(theirs, tmp_path / "ours").notes == ()
    assert restore(tmp_path / "ours").tokenizer.fingerprint == read_model(given).fingerprint
    back = to_hf(tmp_path / "ours", tmp_path / "there").theirs
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (theirs / name).read_bytes()
    both = {read_model(theirs / name).fingerprint for name in ("tokenizer.json", "tokenizer.model")}
    assert opened(f"hf:{theirs}").tokenizers == both
    (theirs / "tokenizer_config.json").write_text("{}")
    assert to_lamella(theirs, tmp_path / "second").notes == ()  # the sentencepiece model is left
    (theirs / "tokenizer.model").unlink()
    assert "want --tokenizer" in to_lamella(theirs, tmp_path / "third").notes[0]
