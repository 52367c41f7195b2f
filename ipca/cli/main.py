"""Output and errors of the command ``ipca``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from ipca.cli.arguments import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    from ipca.cli import commands

    command = getattr(commands, args.command)
    try:
        # With --json, stdout holds the record alone; what a command prints for people goes to stderr.
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            record, text = command(args)
    except KeyboardInterrupt:
        print("ipca: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"ipca: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if args.json and record is not None:
        print(json.dumps(record, indent=2))
    elif text:
        print(text)
    return 0
