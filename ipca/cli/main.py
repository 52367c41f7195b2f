"""Output, errors and exit status of the command ``ipca``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ipca.cli.arguments import parse_arguments
from ipca.cli.completion_command import completion

# Exceptions that commands raise on purpose, with a message for users; any other is shown with its type.
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)

_RESUMED = ("train", "init", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 is done, 1 an error or a failed check, 2 wrong usage, 130 Ctrl-C.
    """
    args = parse_arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without σ and ‖ is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _short_warnings(args.debug), contextlib.redirect_stdout(_elsewhere(args.json, args.quiet)):
            record, text = _command(args.command)(args)
        if args.json and record is not None:
            print(json.dumps(record, indent=2), flush=True)
        elif text and not args.quiet:
            print(text, flush=True)
    except KeyboardInterrupt:
        again = "; the same command goes on from what is finished" if args.command in _RESUMED else ""
        print(f"ipca: interrupted; nothing was left half-written{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has ended, as in `ipca inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last place where any error can become one line
        if args.debug:
            raise
        print(f"ipca: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return int(args.status)


def _command(name: str) -> Callable[[argparse.Namespace], tuple[Any, str]]:
    if name == "completion":  # a shell may ask for it at each start: no torch
        return completion
    from ipca.cli import commands

    command: Callable[[argparse.Namespace], tuple[Any, str]] = getattr(commands, name)
    return command


def _elsewhere(as_json: bool, quiet: bool) -> io.TextIOBase:
    """The stream of a command's own prints: stdout holds only the record with ``--json``, nothing with ``--quiet``."""
    if quiet:
        return io.StringIO()
    return sys.stderr if as_json else sys.stdout  # type: ignore[return-value]


@contextlib.contextmanager
def _short_warnings(debug: bool) -> Iterator[None]:
    """Print a warning as one line without its place in the source, unless ``debug``."""
    before = warnings.formatwarning
    if not debug:
        warnings.formatwarning = lambda message, *_, **__: f"ipca: warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _one_line(error: Exception) -> str:
    notes, place = getattr(error, "__notes__", []), getattr(error, "place", None)
    said = [f"{text.rstrip('.')}." for text in (str(error), *notes)] if notes else [str(error)]
    words = " ".join(" ".join(said).split())
    if place is not None:  # raised by the user's own code
        return f"{type(error).__name__}{': ' if words else ''}{words} Raised at {place}."
    if isinstance(error, _EXPECTED) and words:
        return words
    return f"{type(error).__name__}{': ' if words else ''}{words} (--debug shows where)"
