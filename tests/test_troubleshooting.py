"""docs/troubleshooting.md quotes messages that the sources hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| `(.+?)` \| ", TEXT, flags=re.MULTILINE)


def words(node):
    """The text of a string in the sources, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@pytest.fixture(scope="module")
def sources():
    files = [ROOT / "setup.py", *(path for path in (ROOT / "ipca").rglob("*.py") if "kernels" not in path.parts)]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {words(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))}


def test_the_page_quotes_messages():
    assert len(QUOTED) == len(set(QUOTED)) > 60


@pytest.mark.parametrize("message", QUOTED)
def test_the_message_is_in_the_sources(message, sources):
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), flags=re.DOTALL)
    assert any(pattern.search(text) for text in sources), "no message of ipca reads like this"
