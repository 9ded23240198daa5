"""flash-linear-attention itself: its models' names and shapes, what it saves, its logits and greedy tokens."""

import pytest
import torch

from lamella.convert.check import compare
from lamella.convert.convert import to_hf, to_lamella
from lamella.convert.family import family
from lamella.model.generate import GREEDY, generate
from lamella.train.restore import load_model
from tests.convert.fla_models import CASES, CLASSES, IDS, config_of, drawn, shapes
from tests.convert.models import assert_same_tensors
from tests.convert.models import config_of as read
from tests.kernels.fla import imported

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
EOD, NEW, PROMPT = 0, 6, [3, 17, 9, 30, 4]
PEERS = [
    pytest.param(name, number, marks=pytest.mark.full if number > 1 else ())
    for name, number in IDS
    if "attn" not in CASES[name][number]  # fla's softmax attention is flash-attn's, which needs a GPU
]


def model_of(name, number):
    models = imported("fla.models")
    config = {k: v for k, v in config_of(name, number).items() if k not in ("model_type", "architectures", "dtype")}
    return getattr(models, f"{CLASSES[name]}ForCausalLM")(getattr(models, f"{CLASSES[name]}Config")(**config)).float()


@pytest.mark.parametrize(("name", "number"), PEERS)
def test_what_fla_saves_goes_there_and_back(name, number, tmp_path):
    model = model_of(name, number)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == shapes(config_of(name, number))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(drawn(key, tuple(parameter.shape), number))
    model.save_pretrained(tmp_path / "theirs")
    ours = to_lamella(tmp_path / "theirs", tmp_path / "ours")
    assert ours.model == family(name).read(config_of(name, number), "the case")
    back = to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(back.theirs, tmp_path / "theirs")
    had, has = read(tmp_path / "theirs"), read(back.theirs)
    assert had | {"transformers_version": 0} == has | {"transformers_version": 0}
    parity = compare(ours.checkpoint, ours.model, ours.family, back.theirs, None)
    print(f"{name} {number}: {parity}")
    assert parity.scale > 0.5 and parity.absolute < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_ours_is_loaded_and_gives_the_same_greedy_tokens(name, tmp_path):
    """Its config.json is the one that is made, not one that came."""
    import transformers
    from safetensors.torch import save_file

    kind, number = family(name), 1
    model_of(name, number).save_pretrained(tmp_path / "theirs")
    tensors = {key: drawn(key, shape, number) for key, shape in shapes(config_of(name, number)).items()}
    save_file(tensors, tmp_path / "theirs/model.safetensors", {"format": "pt"})
    ours = to_lamella(tmp_path / "theirs", tmp_path / "ours")
    made = kind.write(ours.model, 64) | {"vocab_size": ours.model.vocab_size, "hidden_size": ours.model.d_model}
    imported("fla")
    config = transformers.AutoConfig.for_model(name, **made, fuse_norm=config_of(name, number).get("fuse_norm", True))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", config=config).eval()
    model = load_model(ours.checkpoint, ours.model, torch.float32)
    wanted = generate(model, [PROMPT], EOD, ours.model.vocab_size, NEW, GREEDY)[0]
    ids = [EOD, *PROMPT]
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(peer(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    got = ids[1 + len(PROMPT) :]
    assert (got[: got.index(EOD)] if EOD in got else got) == wanted and wanted
