"""A model is never held whole: memory while converting is a few tensors', whatever the model's size."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
from lamella.convert.convert import to_hf, to_lamella
from tests.convert.memory import rise
import torch.distributed.checkpoint, safetensors.torch
small, large, out = (Path(word) for word in sys.argv[1:])
to_lamella(small, out / "a"); to_hf(out / "a", out / "b")
print(rise(to_lamella, large, out / "c"), rise(to_hf, out / "c", out / "d"))
"""
TENSOR = 2  # MiB, the largest


def synthetic(folder, layers):
    """A Llama of fp32 noise, written as it is drawn. Returns its size in MiB."""
    import torch

    from lamella.convert.family import family
    from lamella.convert.map import links, places
    from lamella.convert.write import Kind, write_weights

    folder.mkdir()
    width = 512
    tree = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 8, "vocab_size": 512}
    tree |= {"model_type": "llama", "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(tree))
    kind = family("llama")
    model = kind.read(tree, "tree")
    linked = links(places(model), kind.table, kind.layers(model), kind.name)
    kinds = {link.theirs: Kind(link.their_shape, torch.float32) for link in linked}
    write_weights(folder, kinds, ((n, torch.rand(kind.shape)) for n, kind in kinds.items()), limit=10**8)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**20


def test_streaming(tmp_path):
    synthetic(tmp_path / "small", 1)
    whole = synthetic(tmp_path / "large", 24)
    words = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("small", "large", "out"))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    there, back = map(float, done.stdout.split())
    print(f"{whole:.0f} MiB: {there:.0f} MiB more on the way there, {back:.0f} MiB back")
    assert whole > 200
    assert 0 < there < 16 * TENSOR
    assert 0 < back < 64 + 16 * TENSOR  # ours are read in batches of 64 MiB


def test_one_tensor_at_a_time_is_asked_for(tmp_path, monkeypatch):
    """No slice that is read is larger than a saved piece."""
    import torch

    from lamella.checkpoint import boxes
    from lamella.convert.convert import to_lamella
    from lamella.convert.read import Weights

    synthetic(tmp_path / "theirs", 1)
    monkeypatch.setattr(boxes.pieces, "__defaults__", (2**18,))
    sizes, read = [], Weights.read
    monkeypatch.setattr(Weights, "read", lambda *a: sizes.append(read(*a)) or sizes[-1])
    to_lamella(tmp_path / "theirs", tmp_path / "ours")
    assert max(t.numel() * 4 for t in sizes) <= 2**18
    whole = {n: t for file in (tmp_path / "theirs").glob("*.safetensors") for n, t in _load(file).items()}
    assert sum(t.numel() for t in sizes) == sum(t.numel() for t in whole.values())
    assert all(t.dtype == torch.float32 for t in sizes)


def _load(file):
    return pytest.importorskip("safetensors.torch").load_file(file)
