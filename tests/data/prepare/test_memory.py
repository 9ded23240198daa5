"""Preparing takes as much memory for a large corpus as for a small one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lamella.config import DataConfig, SourceConfig, TokenizerConfig, dump
from lamella.data.store.manifest import MODEL

MEASURE = """
import json, re, sys
from pathlib import Path
from lamella.config import load_data
from lamella.data.prepare.prepare import prepare
manifest = prepare(load_data(sys.argv[1]), processes=2).manifest
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([peak / 1024, sum(manifest.total(s).text_bytes for s in ("train", "heldout"))]))
"""
WORDS = ["def", "return", "self", "index", "caf\u00e9", "(0)", "= 17", "\n    "]


def write_records(file: Path, megabytes: int) -> None:
    """Documents of some kilobytes, all different, which encode fast."""
    with file.open("w") as out:
        for number in range(megabytes * 250):
            text = f"{number} " + " ".join(WORDS[(number >> shift) % 8] for shift in range(12)) * 75
            out.write(json.dumps({"text": text[:4000]}) + "\n")


def peak(folder: Path, megabytes: int, model: Path) -> tuple[float, int]:
    """MiB of this process's largest set, and bytes of text."""
    folder.mkdir()
    write_records(folder / "a.jsonl", megabytes)
    source = SourceConfig(format="jsonl", path=str(folder / "a.jsonl"))
    tokenizer = TokenizerConfig(model=str(model))
    dump(DataConfig(path=str(folder / "out"), sources=(source,), tokenizer=tokenizer), folder / "data.yaml")
    command = [sys.executable, "-c", MEASURE, str(folder / "data.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    found, size = json.loads(done.stdout)
    return found, size


@pytest.mark.full
@pytest.mark.timeout(4000)
@pytest.mark.parametrize(("small", "large"), [(10, 1000)])
def test_memory_stays(config, tmp_path, small, large):
    model = Path(config.path) / MODEL
    first, size = peak(tmp_path / "small", small, model)
    second, larger = peak(tmp_path / "large", large, model)
    print(f"{size / 1e6:.0f} MB: {first:.0f} MiB; {larger / 1e6:.0f} MB: {second:.0f} MiB")
    assert larger > 50 * size
    assert second - first < 200
