"""The arguments of the command ``ipca``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ipca._version import __version__
from ipca.lab.baselines.methods import CONTROLS

_EXAMPLES = (
    "ipca inspect path/to/model --window middle --rank 16 --plot spectra.png",
    "ipca inspect path/to/adapter --json",
    "ipca init path/to/model --window 0.33 --rank 16 -o adapter",
    "torchrun --nproc-per-node 4 -m ipca init path/to/model --rank 16 -o adapter",
    "ipca merge path/to/model adapter -o merged",
    "ipca export path/to/model adapter --form truncated --rank 16 -o small",
    "ipca convert path/to/residual-model pissa-adapter --original path/to/model -o adapter",
    "ipca cache list --cache path/to/cache",
    "ipca cache verify --remove",
    "ipca cache prune --max-bytes 10G --older-than 30d",
    "ipca completion bash > ~/.local/share/bash-completion/completions/ipca",
    "ipca sweep task.py --windows 0 0.25 0.5 0.75 1 --lrs 5e-4 1e-3 2e-3 --seeds 5 --workers 2 -o sweep-out",
    "ipca demo --text vaderSentiment-3.3.2.tar.gz -o demo-out",
)
_NOTES = """
A model is a local folder that transformers' save_pretrained wrote.
Exit status: 0 done, 1 the input is wrong or the work failed (the last line on stderr says why), 2 usage, 130 Ctrl-C."""
SHELLS = ("bash", "zsh", "tcsh")


def parser() -> argparse.ArgumentParser:
    """The command line's parser; ``command`` is the name of a function of :mod:`ipca.cli.commands`."""
    top = _with_examples(
        argparse.ArgumentParser(
            "ipca", description="Fine-tune a chosen window of the singular components of pretrained weights."
        )
    )
    top.add_argument("--version", action="version", version=f"ipca {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _inspect(commands.add_parser("inspect", help="spectra and windows of a model folder, or an adapter's"))
    _init(commands.add_parser("init", help="decompose and write the adapter before training"))
    _merge(commands.add_parser("merge", help="fold an adapter into its model"))
    _export(commands.add_parser("export", help="write an adapter for programs without ipca"))
    _convert(commands.add_parser("convert", help="make a stock PEFT LoRA that trains a window an adapter of ipca"))
    _cache(commands.add_parser("cache", help="list, check or shrink a cache of decompositions"))
    _completion(commands.add_parser("completion", help="print a completion script for a shell"))
    _sweep(
        commands.add_parser("sweep", help="windows × learning rates × seeds beside LoRA and controls, with a report")
    )
    _demo(commands.add_parser("demo", help="four ways to fine-tune one model on real text, in about a minute"))
    return top


def _inspect(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add, help="a Hugging Face model folder, or an adapter folder, which takes no options of windows")
    _choice_of_window(add)
    add.add_argument("--plot", type=_picture, metavar="FILE.png", help="draw the spectra")


def _init(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add)
    _choice_of_window(add)
    add.add_argument(
        "--form",
        choices=("intact", "residual"),
        default="intact",
        help="intact: an adapter for the original model (default); residual: a residual model and its adapter",
    )
    add.add_argument("--tol", default="default", help="of the decomposition: fast, default, exact or a number")
    add.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to decompose (default cpu)")
    which = add.add_mutually_exclusive_group()
    which.add_argument("--cache", type=Path, metavar="DIR", help="keep decompositions here (default: $IPCA_CACHE)")
    which.add_argument("--no-cache", action="store_true", help="keep none, whatever $IPCA_CACHE says")
    _out(add)


def _merge(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add, adapter=True)
    _out(add)


def _export(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add, adapter=True)
    add.add_argument(
        "--form",
        choices=("peft", "residual", "truncated"),
        default="peft",
        help="peft: stock LoRA of twice the rank for the original model (default); "
        "residual: a residual model and a LoRA for it alone; truncated: the nearest stock LoRA of --rank",
    )
    add.add_argument("--rank", type=_positive, help="of the truncated form")
    _out(add)


def _convert(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add)
    add.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="a folder that PEFT's save_pretrained wrote")
    add.add_argument(
        "--original",
        type=Path,
        metavar="MODEL_DIR",
        help="where MODEL_DIR is the residual base of a PiSSA adapter: the model that it was made from",
    )
    _out(add)


def _completion(add: argparse.ArgumentParser) -> None:
    _common(add, quiet=False)
    add.add_argument("shell", choices=SHELLS, help="for which shell")


def _cache(add: argparse.ArgumentParser) -> None:
    _with_examples(add)
    actions = add.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every entry, the one used last first")
    verify = actions.add_parser("verify", help="compare every entry with its checksum; status 1 if one is damaged")
    verify.add_argument("--remove", action="store_true", help="delete the damaged ones")
    prune = actions.add_parser("prune", help="delete entries, those unused for longest first")
    prune.add_argument("--max-bytes", type=byte_count, metavar="SIZE", help="until they take no more, such as 10G")
    prune.add_argument("--older-than", type=seconds, metavar="AGE", help="that were not used for so long, such as 30d")
    for action in (listing, verify, prune):
        _common(action)
        action.add_argument("--cache", type=Path, metavar="DIR", help="default: $IPCA_CACHE, else ~/.cache/ipca")


def _sweep(add: argparse.ArgumentParser) -> None:
    _common(add)
    add.add_argument("task", type=Path, metavar="TASK.py", help="a file whose task() returns an ipca.lab.sweep.Task")
    add.add_argument("--windows", nargs="+", metavar="F", help="fractions or other windows (default 0 .125 … 1)")
    add.add_argument("--lrs", nargs="+", type=float, metavar="LR", help="learning rates (default 5e-4 1e-3 2e-3)")
    add.add_argument("--seeds", type=_positive, metavar="N", help="runs of each (default 8)")
    add.add_argument(
        "--methods",
        nargs="*",
        metavar="METHOD",
        help=f"lora, full, auto, and the controls {', '.join(CONTROLS)} (default: lora and the controls)",
    )
    add.add_argument("--comparisons", nargs="+", metavar="HOW", help="same, sqrt-sigma, update (default: all)")
    add.add_argument("--early", type=_positive, metavar="STEPS", help="after which updates are compared (default 10)")
    add.add_argument("--checkpoints", nargs="+", type=_positive, metavar="STEP", help="judge the models there too")
    add.add_argument("--tune", type=_positive, metavar="ROUNDS", help="let Optuna look for each method's best rate")
    add.add_argument("--workers", type=_positive, metavar="N", help="processes side by side (default 1)")
    add.add_argument("--threads", type=_positive, metavar="N", help="of each process (default 1)")
    add.add_argument("--devices", nargs="+", metavar="DEVICE", help="handed to the workers in turn: cuda:0 cuda:1")
    _out(add)


def _demo(add: argparse.ArgumentParser) -> None:
    _common(add, quiet=False)
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


def _common(parser: argparse.ArgumentParser, *, quiet: bool = True) -> None:
    _with_examples(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(quiet=False)
    if quiet:
        parser.add_argument("--quiet", action="store_true", help="print errors alone (and what --json prints)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _with_examples(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Show the examples of this command alone below its help; those of all commands below that of ``ipca``."""
    own = [f"  {example}" for example in _EXAMPLES if f"{parser.prog} " in example]
    parser.epilog = "\n".join(["examples:", *own, _NOTES])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _model(
    parser: argparse.ArgumentParser, *, adapter: bool = False, help: str = "a Hugging Face model folder"
) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help=help)
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
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def byte_count(text: str) -> int:
    """``"500M"`` as bytes; K, M, G and T are powers of 1024."""
    return int(_with_unit(text, {"": 1, **{unit: 1024**k for k, unit in enumerate("KMGT", start=1)}}))


def seconds(text: str) -> float:
    """``"30d"`` as seconds; the units are s, m, h and d."""
    return _with_unit(text, {"s": 1, "m": 60, "h": 3600, "d": 86400})


def _with_unit(text: str, units: dict[str, int]) -> float:
    unit = next((u for u in units if u and text.upper().endswith(u.upper())), "")
    try:
        value = float(text[: len(text) - len(unit)]) * units[unit]
        if not 0 <= value < float("inf"):
            raise ValueError
    except (ValueError, KeyError):
        known = ", ".join(unit for unit in units if unit)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number with one of the units {known}") from None
    return value
