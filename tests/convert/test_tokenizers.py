"""The files beside the weights go both ways, and text comes out the same on both sides."""

import json
import shutil
import warnings

import pytest
import torch

from lamella.config import change
from lamella.convert.convert import to_hf, to_lamella
from lamella.model.generate import GREEDY, generate
from lamella.train.init_from import find_start
from lamella.train.restore import restore
from tests.commands import call
from tests.convert.models import assert_same_tensors, config_of
from tests.corpus import prepare_corpus, tiny_run
from tests.train.untrained import save_untrained

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer
PROMPT = "def main(x):\n    return "
JAMBA = {
    "parts": {
        "mamba": {"mixer": "mamba", "d_state": 4},
        "attention": {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2},
        "mlp": {"channel": "mlp", "d_ff": 48},
        "moe": {"channel": "moe", "num_experts": 4, "d_ff": 48},
    },
    "stack": [{"layers": ["mamba/mlp", "attention/moe", "mamba/mlp"]}],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ours with a checkpoint, and the same in Hugging Face's way."""
    folder = tmp_path_factory.mktemp("trained")
    run = tiny_run(prepare_corpus(folder), folder / "runs", name="mine")
    run = change(run, model=run.model.model_dump(mode="json") | JAMBA)
    save_untrained(run)
    to_hf(run.folder, folder / "theirs")
    return run, folder / "theirs"


def greedy(folder, capfd, *words):
    options = ("--temperature", "0", "--max-tokens", "12", "--json", *words)
    assert call("generate", folder, "--prompt", PROMPT, *options) == 0
    out, err = capfd.readouterr()
    return json.loads(out)["text"], err


def test_a_run_of_ours_says_the_same_there(trained):
    run, theirs = trained
    assert sorted(f.name for f in theirs.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
        peer = transformers.AutoModelForCausalLM.from_pretrained(theirs).eval()
        eod = config_of(theirs)["eos_token_id"]
        ids = torch.tensor([[eod, *tokenizer.encode(PROMPT, add_special_tokens=False)]])
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=eod
        )
    ours = restore(run.folder)
    prompts, size = [ours.tokenizer.encode(PROMPT)], ours.tokenizer.vocab_size
    assert out[0, ids.shape[1] :].tolist() == generate(ours.model, prompts, eod, size, 12, GREEDY)[0]
    for known in (PROMPT, " a  b", "中文 😀\n\n\t", ""):
        ids = ours.tokenizer.encode(known)
        assert tokenizer.encode(known, add_special_tokens=False) == ids and tokenizer.decode(ids) == known


def test_there_and_back(trained, tmp_path, capfd):
    """Another's model with a tokenizer: generate finds it, a new run begins with it, it goes back as it came."""
    run, theirs = trained
    (theirs / "generation_config.json").write_text("{}")
    ours = to_lamella(theirs, tmp_path / "ours")
    assert ours.notes == ()
    assert greedy(tmp_path / "ours", capfd) == greedy(run.folder, capfd)
    assert call("eval", tmp_path / "ours", "--text", __file__, "--rows", "1") == 0
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "ours/hf" / name).read_bytes() == (theirs / name).read_bytes()
    back = to_hf(tmp_path / "ours", tmp_path / "back")
    assert sorted(f.name for f in back.theirs.iterdir()) == sorted(f.name for f in theirs.iterdir())
    assert config_of(back.theirs) == config_of(theirs)
    assert_same_tensors(back.theirs, theirs)
    start = change(run, train=run.train.model_dump(mode="json") | {"init_from": str(tmp_path / "ours")})
    tokenizer = restore(run.folder).tokenizer.fingerprint
    assert find_start(start, tokenizer).sources.keys() == dict(restore(run.folder).model.named_parameters()).keys()


def test_another_tokenizer_is_refused(trained, tmp_path, capfd):
    _, theirs = trained
    to_lamella(theirs, tmp_path / "ours")
    (tmp_path / "ours/tokenizer.model").unlink()
    assert call("generate", tmp_path / "ours", "--prompt", PROMPT) == 2
    assert "no tokenizer for" in capfd.readouterr().err


def test_without_a_tokenizer(trained, tmp_path, capfd):
    _, theirs = trained
    bare = shutil.copytree(theirs, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    notes = to_lamella(bare, tmp_path / "ours").notes
    assert len(notes) == 1 and "--tokenizer" in notes[0]
    wanted, _ = greedy(trained[0].folder, capfd)
    got, err = greedy(tmp_path / "ours", capfd, "--tokenizer", str(theirs / "tokenizer.model"))
    assert got == wanted and "taken as given" in err
