"""Arguments, output and errors of the command ``ipca``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ipca._version import __version__

_EXAMPLES = """examples:
  ipca inspect path/to/model --window middle --rank 16 --plot spectra.png
  ipca init path/to/model --window 0.33 --rank 16 -o adapter
  ipca merge path/to/model adapter -o merged
  ipca export path/to/model adapter --form residual -o exported
  ipca demo --text vaderSentiment-3.3.2.tar.gz -o demo-out

A model is a local folder that transformers' save_pretrained wrote."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
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
    if args.json:
        print(json.dumps(record, indent=2))
    elif text:
        print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _with_examples(
        argparse.ArgumentParser(
            "ipca", description="Fine-tune a chosen window of the singular components of pretrained weights."
        )
    )
    parser.add_argument("--version", action="version", version=f"ipca {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = commands.add_parser("inspect", help="spectra, windows and adapter size of a model folder")
    _common(add)
    _model(add)
    _choice_of_window(add)
    add.add_argument("--plot", type=_picture, metavar="FILE.png", help="draw the spectra")

    add = commands.add_parser("init", help="decompose and write the adapter before training")
    _common(add)
    _model(add)
    _choice_of_window(add)
    add.add_argument(
        "--form",
        choices=("intact", "residual"),
        default="intact",
        help="intact: an adapter for the original model (default); residual: a residual model and its adapter",
    )
    _out(add)

    add = commands.add_parser("merge", help="fold an adapter into its model")
    _common(add)
    _model(add, adapter=True)
    _out(add)

    add = commands.add_parser("export", help="write an adapter for programs without ipca")
    _common(add)
    _model(add, adapter=True)
    add.add_argument(
        "--form",
        choices=("peft", "residual"),
        default="peft",
        help="peft: stock LoRA of twice the rank for the original model (default); "
        "residual: a residual model and a LoRA for it alone",
    )
    _out(add)

    add = commands.add_parser("demo", help="four ways to fine-tune one model on real text, in about a minute")
    _common(add)
    add.add_argument(
        "--text",
        type=Path,
        default=Path("vaderSentiment-3.3.2.tar.gz"),
        help="the source distribution of vaderSentiment 3.3.2 (default: in this folder)",
    )
    add.add_argument("--seeds", type=_positive, default=1, help="runs of each method (default 1)")
    add.add_argument("--steps", type=_positive, default=60, help="training steps of a run (default 60)")
    add.add_argument("--sentences", type=_positive, default=400, help="held-out sentences of each test (default 400)")
    _out(add, default=Path("demo-out"))
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    _with_examples(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _with_examples(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.epilog, parser.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    return parser


def _model(parser: argparse.ArgumentParser, *, adapter: bool = False) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a Hugging Face model folder")
    if adapter:
        parser.add_argument(
            "adapter", type=Path, metavar="ADAPTER_DIR", help="a folder that save_adapter or init wrote"
        )
        parser.add_argument(
            "--any-base", action="store_true", help="do not check that the adapter belongs to the model"
        )


def _choice_of_window(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, default=16, help="components a layer trains (default 16)")
    parser.add_argument(
        "--window",
        default="middle",
        help="principal, middle (default), minor, a fraction such as 0.33, start=256, energy=0.9, or erank",
    )
    parser.add_argument("--alpha", type=float, help="scaling × rank (default: rank)")
    parser.add_argument(
        "--targets", nargs="+", help="names, ends of names or regular expressions (default: all-linear)"
    )
    parser.add_argument("--exclude", nargs="+", default=[], help="likewise, to leave alone")


def _out(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    text = "folder to write" + (f" (default {default})" if default else "")
    parser.add_argument("-o", "--out", type=Path, required=default is None, default=default, help=text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .pdf or .svg")
    return path


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
