"""``ipca completion``: a shell's completion script."""

from __future__ import annotations

import argparse
from typing import Any

from ipca.cli.arguments import PATHS, parser


def completion(args: argparse.Namespace) -> tuple[dict[str, object], str]:
    """The completion script for ``args.shell``, made from the parser."""
    try:
        import shtab
    except ImportError:
        raise ImportError("completion scripts are made by shtab; run: pip install 'ipca-lora[hf]'") from None
    top = parser()
    _complete_paths(top, shtab.FILE)
    script = shtab.complete(top, shell=args.shell)
    return {"shell": args.shell, "script": script}, script


def _complete_paths(add: argparse.ArgumentParser, files: Any) -> None:
    """Mark every argument that is a path, in the way shtab expects."""
    for action in add._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, files)
        elif action.type in PATHS:
            action.complete = files  # type: ignore[attr-defined]
