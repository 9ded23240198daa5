"""Theirs to ours and back: the same tensors bit for bit, the same configuration, logits and greedy tokens."""

import dataclasses
import importlib.util
import warnings

import pytest
import torch

from lamella.convert import family as families
from lamella.convert.check import compare
from lamella.convert.convert import to_hf, to_lamella
from lamella.convert.ours import KEPT, Checkpoint
from lamella.model.generate import GREEDY, generate
from lamella.train.restore import load_model
from tests.convert.models import CASES, EVERY, IDS, assert_same_tensors, config_of, peer, saved, tensors

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer
EOD, NEW = 0, 12
PROMPTS = [[3, 17, 9, 30, 4], [21]]


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory):
    """Each model once: what each conversion returned."""
    folder, done = tmp_path_factory.mktemp("convert"), {}

    def convert(family, number):
        if (family, number) not in done:
            theirs = saved(family, number, folder)
            ours = to_lamella(theirs, folder / f"ours-{family}-{number}")
            back = to_hf(folder / f"ours-{family}-{number}", folder / f"back-{family}-{number}")
            done[family, number] = theirs, ours, back
        return done[family, number]

    return convert


@pytest.mark.parametrize(("family", "number"), IDS)
def test_there_and_back(family, number, there_and_back):
    theirs, ours, back = there_and_back(family, number)
    assert (ours.family.name, back.family.name) == (family, family)
    assert_same_tensors(back.theirs, theirs)
    had, has = config_of(theirs), config_of(back.theirs)
    assert had | {"transformers_version": 0} == has | {"transformers_version": 0}
    parity = compare(ours.checkpoint, ours.model, ours.family, theirs, None)
    print(f"{family} {number}: {parity}")
    assert parity.scale > 0.5 and parity.absolute < 1e-5, parity
    assert compare(back.checkpoint, back.model, back.family, back.theirs, None) == parity


@pytest.mark.parametrize(("family", "number"), IDS)
def test_a_configuration_that_is_not_remembered_means_the_same(family, number, there_and_back):
    """As of a model that was trained here: config.json is made from the stack, and transformers reads it as theirs."""
    theirs, ours, _ = there_and_back(family, number)
    kind = families.family(family)
    made = kind.write(ours.model, 2048) | {"vocab_size": ours.model.vocab_size, "hidden_size": ours.model.d_model}
    made |= {"tie_word_embeddings": ours.model.tie_embeddings, "initializer_range": ours.model.init_std}
    assert kind.read(made, "made") == ours.model
    had = transformers.AutoConfig.from_pretrained(theirs)
    has = type(had)(**made)
    # Neither what training alone sees, nor what may be said in several ways (layers_block_type tells).
    left_out = {*EVERY, "num_experts_per_tok", "pad_token_id", "bos_token_id", "eos_token_id", "dtype", "architectures"}
    left_out |= {"transformers_version", "max_position_embeddings", "num_experts", "_name_or_path", "initializer_range"}
    left_out |= {"rope_theta", "mamba_d_head", "expand", "time_step_min", "chunk_size"}
    left_out |= {"intermediate_size"} if "mamba" in family else set()
    parts = {part.get("mixer") or part.get("channel") for part in ours.model.parts.values()}
    heads = {"num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters"}
    left_out |= set() if "attention" in parts else heads
    left_out |= set() if parts & {"mlp", "moe"} else {"intermediate_size"}
    for key, value in had.to_dict().items():
        if key not in left_out and (family, key) != ("jamba", "router_aux_loss_coef"):
            assert has.to_dict()[key] == value or value is None, key
    for word in ("layers_block_type", "layers_num_experts"):
        assert getattr(has, word, None) == getattr(had, word, None)


@pytest.mark.parametrize("family", CASES)
def test_the_same_greedy_tokens(family, there_and_back):
    _, _, back = there_and_back(family, 0)
    model = load_model(back.checkpoint, back.model, None)
    ours = generate(model, PROMPTS, EOD, back.model.vocab_size, NEW, GREEDY)
    unlike = back.family.unlike
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back.theirs, dtype=torch.float32, **unlike).eval()
    for prompt, wanted in zip(PROMPTS, ours, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of generation's settings
            ids = torch.tensor([[EOD, *prompt]])
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=EOD,
                pad_token_id=EOD,
            )
        got = out[0, ids.shape[1] :].tolist()
        assert (got[: got.index(EOD)] if EOD in got else got) == wanted
    assert any(ours)


@pytest.mark.parametrize("family", ["jamba", "mamba2"])
def test_bf16_goes_both_ways(family, tmp_path):
    theirs = saved(family, 0, tmp_path, torch.bfloat16)
    ours = to_lamella(theirs, tmp_path / "ours")
    assert ours.dtype == torch.bfloat16
    back = to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(back.theirs, theirs)
    assert config_of(back.theirs)["dtype"] == "bfloat16"
    wide = to_hf(tmp_path / "ours", tmp_path / "wide", "fp32")
    assert compare(wide.checkpoint, wide.model, wide.family, wide.theirs, wide.rounded).absolute < 1e-5
    again = to_lamella(tmp_path / "wide", tmp_path / "again")
    assert to_hf(tmp_path / "again", tmp_path / "narrow", "bf16").notes == ("weights rounded to bfloat16",)
    assert_same_tensors(tmp_path / "narrow", theirs)
    assert again.dtype == torch.float32


def test_several_types_come_back_as_they_came(tmp_path):
    """A_log in fp32, the router in fp16, the rest in bf16."""
    model = peer("jamba", 0).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "A_log" in name or "router" in name:
            parameter.data = parameter.data.to(torch.float32 if "A_log" in name else torch.float16) + 1e-3
    model.save_pretrained(tmp_path / "theirs")
    assert len({t.dtype for t in tensors(tmp_path / "theirs").values()}) == 3
    ours = to_lamella(tmp_path / "theirs", tmp_path / "ours")
    back = to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=10**4)
    assert_same_tensors(back.theirs, tmp_path / "theirs")
    assert ours.dtype == back.dtype == torch.bfloat16
    assert config_of(back.theirs).items() <= config_of(tmp_path / "theirs").items()
    assert compare(back.checkpoint, back.model, back.family, back.theirs, None).absolute < 1e-5


def test_another_family_s_names_do_not_round(tmp_path):
    """What came in two types goes to a family with other names in the finer one."""
    model = peer("mamba", 0).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() + 1e-4 if "A_log" in name else parameter.data
    model.save_pretrained(tmp_path / "theirs")
    to_lamella(tmp_path / "theirs", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "original", name="state_spaces")
    held = torch.load(tmp_path / "original/pytorch_model.bin", weights_only=True)
    for name, tensor in tensors(tmp_path / "theirs").items():
        got = held[name.replace("embeddings", "embedding")]
        assert got.dtype == torch.float32 and torch.equal(got, tensor.float()), name


def test_shards(tmp_path):
    """Of at most 8 kB or one tensor: transformers reads ours, we read theirs."""
    theirs = saved("jamba", 0, tmp_path)
    to_lamella(theirs, tmp_path / "ours")
    back = to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=8000)
    files = sorted(f.name for f in back.theirs.glob("*.safetensors"))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_tensors(back.theirs, theirs)
    assert compare(back.checkpoint, back.model, back.family, back.theirs, None).absolute < 1e-5
    to_lamella(back.theirs, tmp_path / "again")
    assert_same_tensors(to_hf(tmp_path / "again", tmp_path / "whole").theirs, theirs)


def test_no_moments_and_what_is_kept(tmp_path):
    to_lamella(saved("llama", 0, tmp_path), tmp_path / "ours")
    ours = Checkpoint(tmp_path / "ours/checkpoints/step-00000000")
    assert ours.values["step"] == 0 and ours.values[KEPT] == dataclasses.asdict(ours.kept)
    assert ours.kept.dtype == "float32" and "tokenizer" not in ours.values
    assert (tmp_path / "ours/model.yaml").is_file()


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="its own loader is the better test")
@pytest.mark.parametrize(("family", "number"), [("mamba", 0), ("mamba", 4), ("mamba2", 1), ("mamba2", 4)])
def test_state_spaces(family, number, tmp_path):
    """Their names around the same weights: as mamba_ssm writes them, the embedding's name and a head that is tied."""
    ours = to_lamella(saved(family, number, tmp_path), tmp_path / "ours")
    made = to_hf(tmp_path / "ours", tmp_path / "original", name="state_spaces")
    held = torch.load(tmp_path / "original/pytorch_model.bin", weights_only=True)
    assert {"backbone.embedding.weight", "lm_head.weight", "backbone.layers.0.mixer.A_log"} <= held.keys()
    assert torch.equal(held["lm_head.weight"], held["backbone.embedding.weight"]) == made.model.tie_embeddings
    assert sorted(f.name for f in made.theirs.iterdir()) == ["config.json", "pytorch_model.bin"]
    again = to_lamella(made.theirs, tmp_path / "again")
    assert again.model.parts != {} and again.family.name == "state_spaces"
    assert to_hf(tmp_path / "again", tmp_path / "back").family.name == family
    assert_same_tensors(tmp_path / "back", tmp_path / f"{family}-{number}")
    parity = compare(again.checkpoint, again.model, ours.family, tmp_path / f"{family}-{number}", None)
    assert parity.absolute < 1e-5
