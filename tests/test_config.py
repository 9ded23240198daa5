"""Configuration: strict, with one clear line for each mistake, and a resolved copy that is a run file again."""

import pytest

from lamella.config import UserError, change, dump, load_data, load_run, parse_layout

RUN = "configs/run/quickstart.yaml"


def test_resolved_copy_reads_back(tmp_path):
    config = load_run(RUN, ["train.steps=7", "layout.tensor=2", "model.parts.moe.top_k=1", "name=other"])
    assert (config.train.steps, config.layout.tensor, config.model.parts["moe"]["top_k"]) == (7, 2, 1)
    dump(config, tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == config
    assert load_run(tmp_path / "config.yaml", ["train.steps=8"]).train.steps == 8


def test_a_group_may_be_named_or_written_in_place(tmp_path):
    for group, name in (("model", "jamba-nano"), ("train", "quickstart")):
        config = load_run(RUN, [f"{group}={name}"])
        assert config == load_run(RUN)
    config = load_run(RUN, ["model.norm_eps=1e-5", "model=jamba-v0.1"])  # in either order
    assert (config.model.d_model, config.model.norm_eps) == (4096, 1e-5)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.yaml").write_text("name: mine\nmodel: jamba-nano\ndata: stdlib\ntrain: quickstart\n")
    # The groups are found in ./configs; one whose keys all have defaults may be absent.
    assert load_run(folder / "mine.yaml").layout.micro_batch == 1


MISTAKES = [
    (["train.stpes=3"], "train.stpes: unknown key; did you mean train.steps?"),
    (["train.optimizer.beta3=0.3"], "did you mean train.optimizer.beta"),
    (["train.steps=-3"], "train.steps: input should be greater than 0, got -3"),
    (["train.steps=many"], "train.steps: input should be a valid integer, got \"many\""),
    (["train.steps='8'"], "train.steps: input should be a valid integer"),
    (["name=off"], "put it in quotes"),
    (["model.d_model=0"], "model.d_model: input should be greater than 0"),
    (["name=../up"], "name: string should match pattern"),
    (["model=jambo-nano"], "jamba-nano"),
    (["train.steps"], "train.steps: an override reads a.b=c"),
    (["train.optimizer.lr=.inf"], "train.optimizer.lr: input should be a finite number"),
    (["data.heldout=1.5"], "data.heldout"),
    (["model.stack=[]"], "model.stack"),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_mistakes_are_one_clear_line(overrides, words):
    with pytest.raises(UserError) as caught:
        load_run(RUN, overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2\nb: 3")
    listed = tmp_path / "list.yaml"
    listed.write_text("- a\n- b\n")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    for file, words in (
        ("configs/run/quikstart.yaml", "no such file; did you mean configs/run/quickstart.yaml?"),
        (broken, "not valid YAML"),
        (listed, "holds no mapping"),
        (binary, "cannot be read"),
        (tmp_path, "cannot be read"),
        (empty, "name: missing"),
    ):
        with pytest.raises(UserError, match=words.replace("?", r"\?")) as caught:
            load_run(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="sources"):
        load_data("configs/data/stdlib.yaml", ["sources=[]"])


def test_layout_words():
    assert parse_layout("tensor=2,sequence_parallel=true").tensor == 2
    assert parse_layout("pipeline=2,cuts=[1,3],data=2").cuts == (1, 3)
    with pytest.raises(UserError, match=r"did you mean tensor\?"):
        parse_layout("tenser=2")


def test_configuration_is_frozen_and_changes_are_checked():
    config = load_run(RUN)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
    assert change(config.train, steps=3).steps == 3
    with pytest.raises(ValueError, match="greater than 0"):
        change(config.train, steps=-1)
