"""What a folder holds, by the files in it."""

from pathlib import Path
from typing import Literal

from lamella.convert.read import BINARY, CONFIG, SAFE

Source = Literal["hf", "megatron", "universal", "lamella"]
WORDS: dict[Source, str] = {
    "hf": "a Hugging Face model",
    "megatron": "a checkpoint of Megatron-LM's",
    "universal": "a universal folder of DeepSpeed's",
    "lamella": "a run or a checkpoint of ours",
}


def kind_of(source: Path) -> Source | None:
    """None where nothing tells."""
    from lamella.convert.megatron.folder import is_megatron
    from lamella.convert.universal.folder import is_universal

    if source.is_file() or any((source / name).is_file() for name in (CONFIG, SAFE, BINARY)):
        return "hf"
    if is_megatron(source):
        return "megatron"
    if is_universal(source):
        return "universal"
    ours = source.name.startswith("step-") or (source / "checkpoints").is_dir() or any(source.glob("step-*"))
    return "lamella" if ours else None
