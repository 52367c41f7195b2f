"""Markdown pages taken apart: sections, code blocks, links, anchors."""

import re


def sections(text):
    """The text below each heading of the second level, by its title."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text, language):
    """The code blocks in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def programs(text):
    """The Python blocks, each with the reason that a comment before it gives for not running it, or an empty text."""
    found = re.findall(r"^(?:<!-- not run: ([^\n]+) -->\n)?```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(program, reason) for reason, program in found]


def without_blocks(text):
    """The text without code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text):
    """The targets of links and pictures that are not addresses on the web."""
    prose = re.sub(r"`[^`\n]*`", "", without_blocks(text))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
