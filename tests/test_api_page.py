"""docs/api.md lists every public name, with what its docstring says today."""

import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import ipca

ROOT = Path(__file__).resolve().parents[1]
for needed in ("peft", "transformers", "matplotlib"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def api_page():
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "docs" / "api_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text():
    return (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_page_is_up_to_date(api_page, text):
    assert text == api_page.page(), "run: python docs/api_page.py"


def test_the_page_lists_every_public_name_of_every_package(text):
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE))
    names = ["ipca", *(info.name for info in pkgutil.walk_packages(ipca.__path__, "ipca.") if info.ispkg)]
    packages = [importlib.import_module(name) for name in names]
    public = {package.__name__: set(package.__all__) for package in packages if hasattr(package, "__all__")}
    assert {"ipca", "ipca.nn", "ipca.peft", "ipca.analysis", "ipca.lab.sweep"} <= set(public)
    assert {name: set(re.findall(r"^\| \[`(\w+)`\]", body, flags=re.MULTILINE)) for name, body in sections.items()} == (
        public
    )


def test_every_link_leads_to_a_file(text):
    links = re.findall(r"\]\((\.\./[^)]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


def test_a_sentence_is_the_first_one_as_markdown(api_page):
    doc = """The ``weight`` of :class:`~ipca.nn.LinearPC`, such as
    ``a | b``. More.

    Args:
    """
    assert api_page.sentence(doc) == r"The `weight` of `ipca.nn.LinearPC`, such as `a \| b`"
    assert api_page.sentence("A layer for a window::\n\n    y = x") == "A layer for a window"


def test_a_name_without_a_docstring_is_refused(api_page):
    package = ModuleType("ipca.made_up", "Made up.")
    package.__all__ = ["run"]
    exec("def run(): pass", vars(package))
    package.run.__module__ = "ipca.window"
    with pytest.raises(ValueError, match=r"ipca\.made_up\.run has no docstring"):
        list(api_page.entries(package))
