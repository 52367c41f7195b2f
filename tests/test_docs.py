"""The pages: every link leads somewhere, every name exists, every program is Python."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import ipca
from tests.helpers.markdown import anchors, blocks, links

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "kernels/**/*.md", "csrc/*.md", "bench/*.md", "studies/**/*.md")
    for path in ROOT.glob(pattern)
)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    broken = []
    for target in links(read(page)):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "docs/"))])
def test_every_name_of_the_package_exists(page):
    for needed in ("peft", "transformers"):
        pytest.importorskip(needed)
    named = set(re.findall(r"(?<![\w./~-])ipca((?:\.[A-Za-z_]\w*)+)", read(page)))
    assert [f"ipca{name}" for name in sorted(named) if not exists(name.split(".")[1:])] == []


def exists(parts):
    """Whether ``ipca.a.b`` is a module or an attribute; a file such as ipca.json counts, and the compiled extension."""
    if parts in (["json"], ["egg"], ["_C"]):
        return True
    value = ipca
    for k, part in enumerate(parts):
        try:
            value = getattr(value, part, None) or importlib.import_module(".".join(("ipca", *parts[: k + 1])))
        except ImportError:
            return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_program_is_python(page):
    for program in blocks(read(page), "python"):
        ast.parse(program.replace("…", "..."))


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"README.md", "index.md"} - set(re.findall(r"\]\(([\w/-]+\.md)\)", index)) == set()
