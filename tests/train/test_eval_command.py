"""`lamella eval`: the training loop's own figure, sums that can be checked by hand, and the user's mistakes."""

import json
import math
import shutil

import pytest
import torch

from lamella.config import change, dump
from lamella.data.prepare.prepare import prepare
from lamella.data.tokenizer import Tokenizer, load
from lamella.model.lm import LanguageModel
from lamella.nn.rows import one_document
from lamella.train.metrics_file import read_metrics
from tests.commands import call
from tests.corpus import tiny_run
from tests.train.untrained import save_untrained


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    return tiny_run(corpus, tmp_path_factory.mktemp("runs"), name="mine", micro_batch=8)


@pytest.fixture(scope="module")
def saved(run):
    return save_untrained(run)


@pytest.fixture
def score(saved, capfd):
    def score(*words, checkpoint=saved[0]):
        assert call("eval", checkpoint, *words, "--json") == 0
        return json.loads(capfd.readouterr().out)

    return score


def by_hand(model: LanguageModel, tokenizer: Tokenizer, text: str) -> float:
    """Nats of a text that fits one row, and of its end: one forward over [eod] + ids, targets ids + [eod]."""
    ids = [*tokenizer.encode(text), tokenizer.eod]
    tokens = torch.tensor([[tokenizer.eod, *ids[:-1]]])
    chance = model(tokens, one_document(tokens))[0].double().log_softmax(-1)
    return -sum(chance[t, token].item() for t, token in enumerate(ids))


def test_it_is_the_training_loop_s_figure(corpus, tmp_path, score, capfd):
    """Trained by two processes, in bf16: the evaluation is in the run's own precision."""
    run = tiny_run(corpus, tmp_path / "runs", micro_batch=2)
    train = run.train.model_dump(mode="json") | {"steps": 2, "precision": "bf16"}
    run = change(run, train=train)
    dump(run, tmp_path / "run.yaml")
    assert call("train", tmp_path / "run.yaml", "--nproc", 2) == 0
    capfd.readouterr()
    last = read_metrics(run.folder / "metrics.jsonl")[-1]
    found = score(checkpoint=run.folder)
    assert found["step"] == 2
    assert found["loss"] == pytest.approx(last["heldout_loss"], rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(last["heldout_bits_per_byte"], rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(last["heldout_loss"]), rel=1e-9)
    assert score("--dtype", "fp32", checkpoint=run.folder)["loss"] == pytest.approx(found["loss"], rel=0.02)
    assert score("--dtype", "fp32", checkpoint=run.folder)["loss"] != found["loss"]


def test_text_files_are_summed_by_hand(saved, corpus, score, tmp_path):
    tokenizer, texts = load(f"{corpus.path}/tokenizer.model"), ["import os\n", "def f():\n    pass # é\n"]
    for number, text in enumerate([*texts, ""]):
        (tmp_path / f"{number}.txt").write_text(text)
    nats = sum(by_hand(saved[1], tokenizer, text) for text in texts)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    names = [word for number in range(3) for word in ("--text", tmp_path / f"{number}.txt")]
    for words in (names, ["--text", tmp_path], ["--text", tmp_path / "*.txt"]):
        found = score(*words)
        assert (found["rows"], found["tokens"]) == (1, tokens)
        assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        size = sum(len(text.encode()) for text in texts)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_long_text_is_cut_into_rows(saved, score, tmp_path):
    (tmp_path / "long.txt").write_text("abc = 1\n" * 200)
    found = score("--text", tmp_path / "long.txt")
    assert found["rows"] == math.ceil(found["tokens"] / 64)
    assert score("--text", tmp_path / "long.txt", "--rows", "2")["tokens"] == 128


def test_splits_rows_and_other_data(saved, corpus, score, tmp_path):
    heldout, train = score(), score("--split", "train")
    assert heldout["tokens"] < train["tokens"]
    assert score("--split", "heldout") == heldout
    few = score("--rows", "3")
    assert few["rows"] == 3
    assert few["tokens"] <= 3 * 64
    same = change(corpus, path=str(tmp_path / "same"), heldout=0.3)
    same = change(same, tokenizer={"model": f"{corpus.path}/tokenizer.model"})
    prepare(same)
    dump(same, tmp_path / "same.yaml")
    other = score("--data", tmp_path / "same.yaml")
    assert other["tokens"] > heldout["tokens"]
    both = score("--data", tmp_path / "same.yaml", "--split", "train")["tokens"] + other["tokens"]
    assert both == heldout["tokens"] + train["tokens"]


def test_what_it_prints(saved, capfd, score):
    result = score()
    assert call("eval", saved[0]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith(f"{saved[0]} on ")
    assert f"{result['tokens']:,} tokens" in out[0]
    assert out[1].startswith(f"loss {result['loss']:.4f} nats a token, perplexity ")


def refused(capfd, words, *said):
    capfd.readouterr()
    assert call("eval", *words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert all(text in err for text in said), err


def test_mistakes(saved, corpus, tmp_path, capfd):
    refused(capfd, [saved[0].parent / "step-00000004"], "no such folder", "step-00000003?")
    refused(capfd, [saved[0], "--rows", "0"], "--rows 0", "at least 1")
    refused(capfd, [saved[0], "--text", "a", "--split", "train"], "--text", "--split")
    refused(capfd, [saved[0], "--text", tmp_path / "none.txt"], "none.txt", "no such file")
    (tmp_path / "empty.txt").touch()
    refused(capfd, [saved[0], "--text", tmp_path / "empty.txt"], "no text there")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    refused(capfd, [saved[0], "--text", tmp_path / "picture.png"], "not UTF-8")
    refused(capfd, [saved[0], "--data", tmp_path / "none.yaml"], "none.yaml", "no such file")
    dump(change(corpus, path=str(tmp_path / "nowhere")), tmp_path / "nowhere.yaml")
    refused(capfd, [saved[0], "--data", tmp_path / "nowhere.yaml"], "nowhere", "lamella data prepare")


def test_another_tokenizer_names_the_cure(saved, corpus, tmp_path, capfd):
    other = change(corpus, path=str(tmp_path / "other"), tokenizer={"vocab_size": 450, "train_megabytes": 1})
    prepare(other)
    dump(other, tmp_path / "other.yaml")
    cure = f"tokenizer.model={corpus.path}"
    refused(capfd, [saved[0], "--data", tmp_path / "other.yaml"], "another tokenizer", cure)


def test_a_damaged_checkpoint(saved, tmp_path, capfd):
    copy = tmp_path / saved[0].name
    shutil.copytree(saved[0], copy)
    piece = next(copy.glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-1])
    refused(capfd, [copy], piece.name, "truncated")
