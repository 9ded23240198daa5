"""The user's mistakes: one clear line, exit code 2, nothing half-written, nothing lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamella.config import change, dump
from tests.commands import call
from tests.corpus import prepare_corpus, tiny_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared corpus and a run of two steps over it, as files."""
    home = tmp_path_factory.mktemp("made")
    config = tiny_run(prepare_corpus(home), home / "runs", name="two")
    config = change(config, train=config.train.model_dump(mode="json") | {"steps": 2})
    dump(config, home / "run.yaml")
    assert call("train", home / "run.yaml", "--nproc", 2) == 0
    return home


@pytest.fixture
def home(made, tmp_path):
    """A copy of it, to be harmed."""
    subprocess.run(["cp", "-r", f"{made}/.", tmp_path], check=True)
    text = (tmp_path / "run.yaml").read_text().replace(str(made), str(tmp_path))
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_refused(capfd, home: Path, words: list, said: list[str]) -> None:
    before, _ = contents(home), capfd.readouterr()
    assert call(*words) == 2
    out = capfd.readouterr()
    lines = [line for line in out.err.splitlines() if line.strip()]
    assert len(lines) == 1, out.err
    for text in said:
        assert text in lines[0]
    assert "Traceback" not in out.out + out.err
    assert contents(home) == before


def train(home, *words):
    return ["train", home / "run.yaml", *words]


CONFIGURATION = [
    (["train.stpes=3"], ["train.stpes", "did you mean train.steps"]),
    (["model.d_model=-32"], ["model.d_model", "greater than 0"]),
    (["model.parts.attention.num_heads=5"], ["num_heads=5", "num_kv_heads=2"]),
    (["model.parts.attention.num_haeds=4"], ["num_haeds", "did you mean num_heads"]),
    (["model.parts.mamba.mixer=mamba3"], ["no mixer 'mamba3'", "mamba"]),
    (["layout.tensor=3"], ["tensor=3", "2 processes"]),
    (["layout.tensor=2", "layout.data=2"], ["needs 4 processes, there are 2"]),
    (["layout.tensor=2", "model.vocab_size=513"], ["513", "tensor=2"]),
    (["layout.pipeline=2", "layout.schedule=zbv"], ["4 pipeline stages for 2 layers", "choose 2 or fewer"]),
    (["layout.pipeline=2", "layout.cuts=[2]"], ["cuts=[2]", "begin at 1 to 1"]),
    (["layout.pipeline=2", "layout.micro_batch=8"], ["schedule=1f1b", "at least pipeline=2 micro-batches"]),
    (["layout.expert=3"], ["expert=3", "tensor=1 x data=2", "the nearest that does is 2"]),
    (["layout.pipeline=2", "layout.zero=2"], ["zero=2", "take zero=1"]),
    (["layout.micro_batch=3"], ["global_batch_size=8", "the nearest that can is 6"]),
    (["layout.tensor=2", "layout.sequence_parallel=true", "train.sequence_length=63"], ["sequence_length=63"]),
    (["model.vocab_size=400"], ["vocab_size=400", "500"]),
    (["train.schedule.kind=wsd"], ["decay_steps=0"]),
]


@pytest.mark.parametrize(("words", "said"), CONFIGURATION, ids=lambda v: ",".join(v))
def test_configuration(words, said, home, capfd):
    assert_refused(capfd, home, train(home, "--nproc", 2, *words), said)


def test_missing_data(home, capfd):
    words = train(home, "--nproc", 2, f"data.path={home}/nowhere")
    assert_refused(capfd, home, words, ["nowhere", "lamella data prepare"])


def test_empty_corpus(home, capfd):
    (home / "empty").mkdir()
    (home / "empty" / "a.txt").touch()
    (home / "data.yaml").write_text(f"path: {home}/none\nsources: [{{format: text, path: {home}/empty}}]\n")
    assert_refused(capfd, home, ["data", "prepare", home / "data.yaml"], ["empty"])


def test_truncated_tokens(home, capfd):
    tokens = next((home / "prepared").glob("*/train.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-100])
    assert_refused(capfd, home, train(home, "--nproc", 2), [tokens.name])


def test_damaged_tokens(home, capfd):
    """Found while it trains: the run has begun, and its checkpoint is as it was."""
    tokens = next((home / "prepared").glob("*/train.bin"))
    raw = bytearray(tokens.read_bytes())
    raw[::1000] = bytes(byte ^ 1 for byte in raw[::1000])
    tokens.write_bytes(raw)
    before = contents(home / "runs/two/checkpoints")
    capfd.readouterr()
    assert call(*train(home, "--nproc", 2, "train.steps=4")) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "continues from" not in line]
    assert len(lines) == 1 and "train.bin: damaged" in lines[0] and "train.rows.damaged=replace" in lines[0]
    assert contents(home / "runs/two/checkpoints") == before


def test_another_tokenizer(home, capfd):
    model = next((home / "prepared").glob("*.model"))
    model.write_bytes(model.read_bytes() + b"\n")
    assert_refused(capfd, home, train(home, "--nproc", 2), ["tokenizer"])


@pytest.mark.parametrize("file", ["*.distcp", ".metadata", "run.json", "manifest.json"])
def test_a_flipped_byte_in_the_checkpoint(file, home, capfd):
    checkpoint = home / "runs/two/checkpoints/step-00000002"
    damaged = next(checkpoint.glob(file))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert_refused(capfd, home, train(home, "--nproc", 2, "train.steps=3"), ["step-00000002", damaged.name])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.parts.mlp.d_ff=64"], "another parts"),
        (["train.sequence_length=32"], "another sequence_length"),
        (["train.seed=8"], "another seed"),
    ],
    ids=lambda v: str(v),
)
def test_a_checkpoint_of_another_run(words, said, home, capfd):
    assert_refused(capfd, home, train(home, "--nproc", 2, "train.steps=3", *words), [said, "another name"])


@pytest.mark.parametrize(
    ("where", "words", "said"),
    [
        ("tow", [], ["runs/tow: no such folder", "did you mean", "runs/two"]),
        ("two", ["model.vocab_size=520"], ["embedding.weight is [512, 32]", "set model.vocab_size=512"]),
        ("two", ["model.stack=[{layers: [mamba/mlp, attention/mlp]}]"], ["has no layers.0.channel.w_in.weight"]),
    ],
    ids=["missing", "vocabulary", "unmapped"],
)
def test_weights_to_begin_with(where, words, said, home, capfd):
    words = ["name=new", f"train.init_from={home}/runs/{where}", *words]
    assert_refused(capfd, home, train(home, "--nproc", 2, *words), said)


def test_a_file_where_the_run_folder_should_be(home, capfd):
    (home / "runs" / "taken").write_text("mine")
    assert_refused(capfd, home, train(home, "--nproc", 2, "name=taken"), ["taken", "is a file"])
    (home / "flat").write_text("mine")
    assert_refused(capfd, home, train(home, "--nproc", 2, f"runs={home}/flat"), ["flat", "is a file"])


def test_a_launcher_that_said_half(home, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert_refused(capfd, home, train(home), ["RANK", "MASTER_ADDR"])


def on_read_only(folder: Path, *words) -> subprocess.CompletedProcess:
    """The command line where `folder` cannot be written: a read-only mount for root, whom modes do not stop."""
    argv = [sys.executable, "-m", "lamella", *map(str, words)]
    if os.geteuid() == 0:
        script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
        argv = ["unshare", "-m", "sh", "-c", script, "sh", str(folder), *argv]
        return subprocess.run(argv, capture_output=True, text=True)
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        return subprocess.run(argv, capture_output=True, text=True)
    finally:
        folder.chmod(mode)


@pytest.mark.parametrize("what", ["run", "data"])
def test_a_read_only_mount(what, home):
    (home / "sealed").mkdir()
    if what == "run":
        words = train(home, "--nproc", 2, f"runs={home}/sealed")
    else:
        (home / "data.yaml").write_text(f"path: {home}/sealed/out\nsources: [{{format: stdlib}}]\n")
        words = ["data", "prepare", home / "data.yaml"]
    done = on_read_only(home / "sealed", *words)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "cannot be written" in done.stderr
    assert not list((home / "sealed").iterdir())
