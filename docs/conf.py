"""The documentation site, made by Sphinx from these pages and from the docstrings: `make docs`."""

import os
import re
import sys
from pathlib import Path

from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

import api_page

import ipca

REPOSITORY = os.environ.get("IPCA_REPOSITORY_URL", "").rstrip("/")
"""As for setup.py. Without it, links to files outside of these pages lead to the checkout."""

project, author, version = "ipca", "ipca developers", ipca.__version__
project_copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["README.md", "_build"]  # index.md includes README.md
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!ipca\b).*"),  # names of other packages
    (r"py:class", r"ipca\..*\.(Model|Layer|Factors|Kept|Grid|CheckpointWeights|ExpertStack)"),  # in signatures only
]
highlight_language = "none"  # indented blocks are formulas
nb_execution_mode = "off"  # the notebook holds its outputs; a test executes it

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_param = False  # which would split "rank, window: …" into two entries
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 160  # of names in full

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"ipca {version}"
html_show_sphinx = False
html_static_path = html_css_files = ["site.css"]


def address(path: Path) -> str:
    """Where a file of the repository is read."""
    if not REPOSITORY:
        return path.as_uri()
    return f"{REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/HEAD/{path.relative_to(ROOT).as_posix()}"


def lead_outside(text: str, folder: Path) -> str:
    """Markdown in which links to files outside of these pages, but for pictures, are addresses."""

    def link(match: re.Match[str]) -> str:
        target, mark, anchor = match[2].partition("#")
        path = (folder / target).resolve()
        if path.is_relative_to(DOCS):
            return match[0]
        if not path.exists():
            logging.getLogger(__name__).warning("%s links to %s, which does not exist", folder, target)
        return f'<a href="{address(path)}{mark}{anchor}">{match[1]}</a>'  # Markdown has no links to file: addresses

    return re.sub(r"(?<!!)\[([^]]*)\]\((\.\./[^)\s]+)\)", link, text)


def read(app, docname, source):
    """A page, before it is parsed."""
    text = api_page.page(site=True) if docname == "api" else source[0]
    source[0] = lead_outside(text, (DOCS / docname).parent)


def read_included(app, path, docname, source):
    """README.md of this folder, before it is parsed."""
    source[0] = lead_outside(source[0], DOCS)


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", lambda app: api_page.write_entries(DOCS / "api"))
    app.connect("source-read", read)
    app.connect("include-read", read_included)
