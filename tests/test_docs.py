"""The documents say what the code says."""

import re
from pathlib import Path

import pytest

from lamella.config import load_run
from tools import config_reference

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_configuration_s_page_is_the_models():
    assert config_reference.PAGE.read_text() == config_reference.page(), "run python tools/config_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_is_there(page):
    """Links, and paths of this project in backquotes."""
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    rooms = r"(?:src|configs|launch|tools|docs|tests|kernels)/[\w./-]+\.(?:py|yaml|sh|md|c|h)"
    named = [ROOT / path for path in re.findall(rf"`({rooms})`", text) if "NAME" not in path]
    assert [str(p) for p in [*links, *named] if not p.exists()] == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "run").glob("*.yaml")), ids=lambda p: p.name)
def test_every_run_file_loads(file):
    assert load_run(file).train.steps > 0
