"""The table of tiles: the first entry that fits, a user's before the shipped ones, a wrong file told by its name."""

import json

import pytest

from lamella_kernels import tiles


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a user's table and makes it the one that is read."""
    file = tmp_path / "tiles.json"

    def write(text: str) -> None:
        file.write_text(text)
        monkeypatch.setenv("LAMELLA_TILES", str(file))
        forget()

    def forget() -> None:
        tiles.table.cache_clear()
        tiles._entry.cache_clear()

    yield write
    monkeypatch.undo()
    forget()


def test_every_kernel_has_tiles_for_every_architecture_and_size():
    for kernel, entries in tiles.table().items():
        names = {name for entry in entries for name in entry.get("up_to", {})}
        for arch in tiles.ARCHITECTURES:
            with tiles.compiled_for(arch):
                for size in (1, 10**6):
                    found = tiles.tiles(kernel, **dict.fromkeys(names, size))
                    assert found["num_warps"] in (1, 2, 4, 8, 16, 32) and not found.keys() & set(tiles.CONDITIONS)


def test_a_users_entry_goes_first_where_it_fits(own):
    kernel = "swiglu"
    shipped = tiles.table()[kernel][-1]
    mine = shipped | {"num_warps": 2 * shipped["num_warps"], "arch": [80]}
    own(json.dumps({kernel: [mine]}))
    with tiles.compiled_for(80):
        assert tiles.tiles(kernel)["num_warps"] == mine["num_warps"]
    with tiles.compiled_for(90):
        assert tiles.tiles(kernel)["num_warps"] == shipped["num_warps"]


@pytest.mark.parametrize("text", ["{", '{"swiglu": [{"num_warps": 4}]}', '{"no_kernel": [{"num_warps": 4}]}'])
def test_a_wrong_file_is_named(own, text):
    own(text)
    with pytest.raises(ValueError, match="LAMELLA_TILES="):
        tiles.table()
