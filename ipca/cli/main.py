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
        with _short_warnings(args.debug), _stdout_elsewhere(args.json, args.quiet):
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


@contextlib.contextmanager
def _stdout_elsewhere(as_json: bool, quiet: bool) -> Iterator[None]:
    """Send what a command prints to stderr with ``--json``, nowhere with ``--quiet``: stdout is for the record.

    The file descriptor goes there too: processes that the command starts, such as workers of a sweep, inherit it.
    """
    if not (as_json or quiet):
        yield
        return
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stderr), open(os.devnull, "wb") as nowhere:
        try:
            before = os.dup(1)
        except OSError:  # it is closed, for those processes too
            yield
            return
        try:
            _flush_stdout()
            with contextlib.suppress(OSError):  # stderr is closed
                os.dup2(nowhere.fileno() if quiet else 2, 1)
            yield
        finally:
            _flush_stdout()
            os.dup2(before, 1)
            os.close(before)


def _flush_stdout() -> None:
    """Write what is buffered for the file descriptor of stdout, before that changes."""
    if sys.__stdout__ is not None:
        with contextlib.suppress(OSError, ValueError):  # closed
            sys.__stdout__.flush()


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
