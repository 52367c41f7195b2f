"""The documentation site: it is built without a warning, has an entry for every public name, and no broken link."""

import inspect
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.test_docstrings import VALUES

pytest.importorskip("furo")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://example.org/owner/ipca"


class Page(HTMLParser):
    """The targets of links and pictures of one page, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors = set(), {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.add(values.get("id"))
        self.targets |= {values[name] for name in ("href", "src") if values.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "docs", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPCA_REPOSITORY_URL": REPOSITORY}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_every_public_name_has_an_entry(site):
    *_, entries = (site / "objects.inv").read_bytes().split(b"\n", 4)  # four lines of text, then "name py:kind …"
    names = {line.split()[0] for line in zlib.decompress(entries).decode().splitlines() if " py:" in line}
    assert {path for path, value in VALUES.items() if not inspect.ismodule(value)} - names == set()


def test_every_page_is_there(site):
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in sources - {Path("README.html")} if not (site / page).is_file()} == set()


def test_no_link_is_broken(site):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken, checked = [], 0
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if target.startswith(REPOSITORY):
                file = re.sub(r"^/owner/ipca/(blob|tree)/HEAD/", "", unquote(parts.path))
                found = parts.path == "/owner/ipca" or (ROOT / file).exists()
            elif parts.scheme:
                continue
            else:
                file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                found = file.is_file() and (file not in pages or unquote(parts.fragment) in pages[file].anchors)
            checked += 1
            if not found:
                broken.append((path.name, target))
    assert broken == []
    assert checked > 1000
