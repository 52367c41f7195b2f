"""Write docs/api.md, the list of all public names, from the packages' ``__all__`` and the docstrings' first sentences.

python docs/api_page.py            write the page
python docs/api_page.py --check    exit 1 if the page is not up to date

For the site, docs/conf.py makes a page for each package from the same lists, with whole docstrings.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
sys.path.insert(0, str(ROOT))

HEAD = """# API reference

Everything public, by package, made from the docstrings by `python docs/api_page.py`. The site (`make docs`) and
`help(ipca.apply_pc)` show arguments, shapes and errors. Names that are not listed here may change in any version.
"""


def packages() -> Iterator[ModuleType]:
    """``ipca`` and each package below it that has an ``__all__``."""
    import ipca

    yield ipca
    for info in pkgutil.walk_packages(ipca.__path__, "ipca."):
        if info.ispkg and info.name != "ipca.kernels":
            package = importlib.import_module(info.name)
            if hasattr(package, "__all__"):
                yield package


def section(package: ModuleType, *, site: bool = False) -> str:
    """One package: its docstring's first sentence, and a table of its names, which lead to the source or the entry."""
    form = f"{{{{py:obj}}}}`{{0}} <{package.__name__}.{{0}}>`" if site else "[`{0}`]({1})"
    rows = [f"| {form.format(name, link)} | {text} |" for name, link, text in entries(package)]
    return "\n".join([f"## {package.__name__}", "", sentence(package.__doc__), "", "| | |", "|---|---|", *rows])


def names(package: ModuleType) -> list[str]:
    """The public names of ``package``, sorted."""
    return sorted(package.__all__, key=lambda name: (name.lower(), name))


def entries(package: ModuleType) -> Iterator[tuple[str, str, str]]:
    """Name, link to the source and description of each public name of ``package``, sorted."""
    for name in names(package):
        value = getattr(package, name)
        if isinstance(value, ModuleType):
            yield name, f"#{value.__name__.replace('.', '')}", sentence(value.__doc__)
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            module, text = importlib.import_module(value.__module__), value.__doc__
        else:
            module, text = constant(package, name)
        if not text and callable(value):
            raise ValueError(f"{package.__name__}.{name} has no docstring.")
        file = Path(inspect.getfile(module)).resolve().relative_to(ROOT)
        yield name, f"../{file.as_posix()}", sentence(text) or f"`{value}`"


def constant(package: ModuleType, name: str) -> tuple[ModuleType, str]:
    """The module that defines a constant which ``package`` offers, and the string below its definition."""
    source = package
    for node in ast.parse(inspect.getsource(package)).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            source = importlib.import_module(node.module or "")
    if source is not package and name not in definitions(source) and hasattr(source, "__all__"):
        return constant(source, name)
    return source, definitions(source).get(name, "")


@cache
def definitions(module: ModuleType) -> dict[str, str]:
    """The constants of a module, and the string literal that follows each, or an empty text."""
    body = ast.parse(inspect.getsource(module)).body
    found = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        follows = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = str(after.value.value) if follows else ""  # type: ignore[union-attr]
        found |= {target.id: text for target in targets if isinstance(target, ast.Name)}
    return found


def sentence(text: str | None) -> str:
    """The first sentence of a docstring, as Markdown in one line."""
    first = " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())
    first = re.split(r"(?<=[^.]\.)\s|:$", first, maxsplit=1)[0].rstrip(".:")
    first = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", first)
    return re.sub(r"``([^`]+)``", r"`\1`", first).replace("|", "\\|")


def page(*, site: bool = False) -> str:
    """The whole page; for the site its names lead to the entries."""
    parts = [HEAD.strip(), *(section(package, site=site) for package in packages())]
    if site:
        pages = [f"api/{package.__name__}" for package in packages()]
        parts.append("\n".join(["```{toctree}", ":hidden:", *pages, "```"]))
    return "\n\n".join(parts) + "\n"


def write_entries(folder: Path) -> None:
    """Write a page for each package to ``folder``, with an entry for each name, for Sphinx's autodoc."""
    folder.mkdir(exist_ok=True)
    homes: dict[int, str] = {}
    for package in packages():
        title = package.__name__
        parts = [f"{title}\n{'=' * len(title)}", f".. automodule:: {title}"]
        parts += [entry(package, name, homes) for name in names(package)]
        text = "\n\n".join(filter(None, parts)) + "\n"
        file = folder / f"{title}.rst"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def entry(package: ModuleType, name: str, homes: dict[int, str]) -> str:
    """The directive of one name; what another package offers too is described in the first one only."""
    value, path = getattr(package, name), f"{package.__name__}.{name}"
    if isinstance(value, ModuleType):
        return ""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        text = inspect.cleandoc(constant(package, name)[1]).replace("\n", "\n   ")
        shown = tuple(value) if isinstance(value, dict) else value
        return f".. py:data:: {name}\n   :value: {shown!r}\n\n   {text}"
    kind = "class" if inspect.isclass(value) else "function"
    if kind == "class" and issubclass(value, Exception):
        kind = "exception"
    home = homes.setdefault(id(value), path)
    if home != path:
        return f".. py:{kind}:: {name}\n\n   The same as :py:obj:`{home}`."
    return f".. auto{kind}:: {path}" + ("\n   :members:" if kind == "class" else "")


def main() -> int:
    """Write the page, or check it."""
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    print("docs/api.md is not up to date; run: python docs/api_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
