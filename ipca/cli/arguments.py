"""The arguments of the command ``ipca``: the parser, the types of values, and checks that concern several arguments."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ipca._version import __version__
from ipca.lab.names import BASELINES, COMPARISONS, CONTROLS, PICTURES, TASK_EXAMPLES
from ipca.train.settings import DTYPES, LOSS_ON, SCHEDULES, TASKS
from ipca.window import TRAINED, Window

_EXAMPLES = (
    "ipca train path/to/model german.txt --keep english.txt -o german",
    "ipca train path/to/model chats.jsonl --max-kl 0.1 --steps 500 -o assistant",
    "ipca train path/to/encoder reviews.csv --columns text=review label=stars -o stars",
    "torchrun --nproc-per-node 4 -m ipca train path/to/model chats.jsonl -o assistant",
    "ipca tradeoff path/to/model german german-test.txt --max-kl 0.1 -o german-milder",
    "ipca inspect path/to/model --window middle --rank 16 --plot spectra.png",
    "ipca inspect path/to/adapter --json",
    "ipca init path/to/model --window 0.33 --rank 16 -o adapter",
    "torchrun --nproc-per-node 4 -m ipca init path/to/model --rank 16 -o adapter",
    "ipca init path/to/bert --class BertForSequenceClassification -o adapter",
    "ipca merge path/to/model adapter -o merged",
    "ipca export path/to/model adapter --format truncated --rank 16 -o small",
    "ipca convert path/to/residual-model pissa-adapter --original path/to/model -o adapter",
    "ipca cache list --cache path/to/cache",
    "ipca cache verify --remove",
    "ipca cache prune --max-bytes 10G --older-than 30d",
    "ipca doctor",
    "ipca doctor --json",
    "ipca tune path/to/model --rank 16 64 --tokens 1 4096",
    "ipca tune --shapes 4096x4096 11008x4096 --form intact",
    "ipca completion bash > ~/.local/share/bash-completion/completions/ipca",
    "ipca sweep task.py --windows 0.0 0.25 0.5 0.75 1.0 --lrs 5e-4 1e-3 2e-3 --seeds 5 --workers 2 -o sweep-out",
    "ipca sweep --example lm > task.py",
    "ipca sweep task.py --seeds 5 -o sweep-out --dry-run",
    "ipca report sweep-a sweep-b --labels SST-2 RTE -o paper",
    "ipca demo --text vaderSentiment-3.3.2.tar.gz -o demo-out",
)
_NOTES = """
A model is a folder that transformers' save_pretrained wrote. Models and adapters may be ids on the Hugging Face Hub.
Exit status: 0 done, 1 the input is wrong or the command failed (the last line on stderr says why) or doctor found a
fault, 2 wrong usage, 130 Ctrl-C."""
SHELLS = ("bash", "zsh", "tcsh")
_TRAIN = "the factors that train; the other one is frozen (default both)"
_MAGNITUDE = "size at which all components start, over the root mean square of the singular values (default: their own)"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line; wrong usage ends the process with status 2."""
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        args.fail(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command == "export" and (args.format == "truncated") != (args.rank is not None):
        args.fail("--format truncated needs --rank" if args.rank is None else "--rank is only for --format truncated")
    if args.command == "cache" and args.action == "prune" and args.max_bytes is None and args.older_than is None:
        args.fail("choose what to delete: --max-bytes, --older-than, or both")
    if args.command == "tune" and (args.model is None) == (args.shapes is None):
        args.fail("give a model's folder or --shapes, one of them")
    if args.command in ("train", "tradeoff") and args.gate and args.max_kl is None and args.max_drift is None:
        args.fail("--gate needs a budget: --max-kl or --max-drift")
    if args.command == "sweep" and args.comparisons and "same" not in args.comparisons:
        args.fail("--comparisons must include same")
    if args.command == "report" and args.out is None and (len(args.sweeps) > 1 or args.labels or args.format):
        args.fail("several sweeps, --labels and --format need --out")
    for name in ("windows", "lrs", "methods", "comparisons") if args.command == "sweep" else ():
        values = getattr(args, name) or []
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            args.fail(f"--{name} has {twice} twice")
    return args


def check_output_folder(args: argparse.Namespace) -> None:
    """Raise where --out, or what is written in it, is the adapter that is read, or a model that is read."""
    from ipca.io.output_folder import check_not_read

    given = vars(args)
    inside = given.get("force") and "residual" in (given.get("format"), given.get("form"))
    models = [given.get("model"), given.get("original")]
    check_not_read(args.out, model=models, adapter=[given.get("adapter")], residual=bool(inside))


def find_folders(args: argparse.Namespace) -> None:
    """Replace ids of models and adapters on the Hub by their local folders; ``args.base`` is the model as named."""
    from ipca.io.hub import adapter_folder, model_folder

    args.base = (vars(args).get("original") or args.model).as_posix()
    for name, find in (("model", model_folder), ("original", model_folder), ("adapter", adapter_folder)):
        if vars(args).get(name):
            setattr(args, name, find(getattr(args, name)))


class _Parser(argparse.ArgumentParser):
    """A parser that names an unknown option, and the one that was probably meant, before it misses another."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers is None:  # else most options are those of a command
            known = list(self._option_string_actions)
            for word in args or ():
                name = word.partition("=")[0]
                if word == "--":
                    break
                if not name.startswith("--") or " " in word or any(option.startswith(name) for option in known):
                    continue
                near = difflib.get_close_matches(name.lower().replace("_", "-"), known, 1)
                self.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().parse_known_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """The command line's parser; ``command`` is the name of a function of :mod:`ipca.cli.commands`."""
    top = _with_examples(
        _Parser("ipca", description="Fine-tune a chosen window of the singular components of pretrained weights.")
    )
    top.add_argument("--version", action="version", version=f"ipca {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train(commands.add_parser("train", help="fine-tune a model on a file of data, and measure what it forgets"))
    _tradeoff(
        commands.add_parser("tradeoff", help="scale a trained adapter: its loss on new data against what is forgotten")
    )
    _inspect(
        commands.add_parser("inspect", help="show spectra and windows of a model folder, or an adapter's contents")
    )
    _init(commands.add_parser("init", help="decompose a model and write the adapter before training"))
    _merge(commands.add_parser("merge", help="write the model with an adapter merged into it"))
    _export(commands.add_parser("export", help="write an adapter for programs without ipca"))
    _convert(commands.add_parser("convert", help="convert a stock PEFT LoRA that trains a window into an ipca adapter"))
    _cache(commands.add_parser("cache", help="list, verify or prune a cache of decompositions"))
    _doctor(commands.add_parser("doctor", help="check the installation, and Triton's kernels on this machine's GPU"))
    _tune(commands.add_parser("tune", help="measure the fastest backends and kernels for a model on this GPU"))
    _completion(commands.add_parser("completion", help="print a completion script for a shell"))
    _sweep(
        commands.add_parser("sweep", help="windows × learning rates × seeds beside LoRA and controls, with a report")
    )
    _report(commands.add_parser("report", help="the report of sweeps, side by side, with figures and tables as files"))
    _demo(commands.add_parser("demo", help="ipca train on a small model and real text, in about a minute"))
    return top


def _train(add: argparse.ArgumentParser) -> None:
    _common(add)
    add.add_argument(
        "model", nargs="?", type=not_empty, metavar="MODEL", help="a Hugging Face model: a folder or its id on the Hub"
    )
    add.add_argument(
        "data",
        nargs="?",
        type=not_empty,
        metavar="DATA",
        help="JSONL, CSV, TSV, Parquet or text, a folder of these or of images by class, or a data set on the Hub",
    )
    _about_data(add)
    add.add_argument(
        "--held-out",
        type=share_or_path,
        metavar="SHARE|FILE",
        help="rows for evaluation: a share of DATA, or another file (default 0.1)",
    )
    budget = _budget(add)
    budget.add_argument(
        "--patience", type=positive_int, metavar="N", help="evaluations above the budget until it stops (3)"
    )
    budget.add_argument(
        "--no-rescale",
        dest="rescale",
        action="store_const",
        const=False,
        help="never scale the trained change down to the budget; keep a checkpoint as it is",
    )
    window = add.add_argument_group("adapter")
    window.add_argument(
        "--window", type=any_window, help="principal, middle (default), minor, a fraction, start=256, inputs:minor, …"
    )
    window.add_argument("--rank", type=positive_int, help="trained components of each layer (default 16)")
    window.add_argument("--alpha", type=positive_number, help="scaling × rank (default: rank)")
    window.add_argument("--targets", nargs="+", metavar="PATTERN", help="names or ends of names (default: all-linear)")
    window.add_argument("--train", choices=TRAINED, help=_TRAIN)
    window.add_argument("--magnitude", type=magnitude, metavar="M", help=_MAGNITUDE)
    run = add.add_argument_group("training")
    run.add_argument("--lr", type=positive_number, help="peak learning rate (default 1e-3; principal 3e-4)")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive_number, help="passes over DATA (default 3)")
    length.add_argument("--steps", type=positive_int, help="optimizer steps")
    run.add_argument("--batch", type=positive_int, help="rows of a step, over all processes (default 16)")
    run.add_argument("--micro-batch", type=positive_int, help="rows of a forward pass (default: all)")
    run.add_argument("--packing", action="store_true", default=None, help="pack rows into sequences of --max-length")
    run.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate (default linear)")
    run.add_argument("--warmup", type=probability, metavar="SHARE", help="of the steps, in which it rises (0.05)")
    run.add_argument("--weight-decay", type=non_negative_number, help="of AdamW (default 0)")
    run.add_argument("--evaluations", type=positive_int, metavar="N", help="over the run (default 10)")
    run.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the frozen weights; factors and heads train in float32 (default: as stored; on a CPU float32)",
    )
    run.add_argument("--gradient-checkpointing", action="store_true", default=None, help="less memory, more time")
    run.add_argument("--report-to", nargs="+", metavar="NAME", help="wandb, tensorboard, … as TrainingArguments")
    add.add_argument("--config", type=path, metavar="RUN.yaml", help="settings; options of the command line go first")
    add.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    _out(add)


def _tradeoff(add: argparse.ArgumentParser) -> None:
    _common(add)
    add.add_argument("model", type=not_empty, metavar="MODEL", help="the base: a folder or its id on the Hub")
    add.add_argument("adapter", type=path, metavar="ADAPTER", help="a LoRA of PEFT or of ipca: a folder or an id")
    add.add_argument(
        "data", type=not_empty, metavar="DATA", help="what the adapter was trained for, held out: as for ipca train"
    )
    _about_data(add)
    _budget(add)
    add.add_argument(
        "--scales", nargs="+", type=non_negative_number, metavar="λ", help="(default 0 0.25 0.5 0.75 1 1.25)"
    )
    add.add_argument(
        "--scale", type=positive_number, metavar="λ", help="of the adapter that -o writes (default: the best)"
    )
    add.add_argument("--any-base", action="store_true", help="do not check that the adapter was made on this model")
    add.add_argument("--batch", type=positive_int, help="rows of a forward pass (default 16)")
    add.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored; on a CPU float32)")
    add.add_argument("--plot", type=picture_path, metavar="FILE.png", help="draw the curve (.png, .pdf or .svg)")
    add.add_argument(
        "-o", "--out", type=path, metavar="OUT", help="write the adapter with the best, or --scale's, scale"
    )
    add.add_argument("--force", action="store_true", help="replace what the output folder holds")


def _about_data(add: argparse.ArgumentParser) -> None:
    add.add_argument("--task", choices=TASKS, help="(default: what the columns say)")
    add.add_argument(
        "--columns",
        nargs="+",
        action=Columns,
        metavar="ROLE=NAME",
        help="columns by role: text, messages, prompt, completion, label, tokens, tags, image",
    )
    add.add_argument(
        "--loss-on", choices=LOSS_ON, help="tokens of chats and of prompts with completions that count (answers)"
    )
    add.add_argument("--max-length", type=positive_int, help="tokens of a sequence (default 512)")
    add.add_argument("--seed", type=int, help="of the order, of new heads and of samples (default 0)")


def _budget(add: argparse.ArgumentParser) -> Any:
    """Add what is measured and its limit; returns their group."""
    keep = add.add_argument_group("forgetting")
    keep.add_argument(
        "--keep",
        type=not_empty,
        metavar="KEEP",
        help="what must not be forgotten: text, rows, images, or a .py with measure(model, processor) (default: for a "
        "language model samples of its own, else nothing)",
    )
    keep.add_argument("--keep-tokens", type=positive_int, metavar="N", help="tokens of KEEP that are measured (8192)")
    limit = keep.add_mutually_exclusive_group()
    limit.add_argument("--max-kl", type=positive_number, metavar="X", help="budget: KL(base ‖ tuned), nats per token")
    limit.add_argument("--max-drift", type=positive_number, metavar="X", help="budget of encoders: drift of embeddings")
    keep.add_argument("--gate", action="store_true", help="exit status 2 where the budget is broken")
    return keep


class Columns(argparse.Action):
    """``text=review label=stars`` as a mapping."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        pairs = [value.partition("=") for value in values]
        wrong = next((value for value, (role, _, name) in zip(values, pairs, strict=True) if not (role and name)), None)
        if wrong is not None:
            parser.error(f"{option} takes ROLE=NAME, such as text=review; got {wrong!r}")
        setattr(namespace, self.dest, {role: name for role, _, name in pairs})


def _inspect(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(
        add,
        help="a model, or an adapter, for which the window options do not apply: a folder or its id on the Hub",
    )
    _choice_of_window(add)
    add.add_argument("--plot", type=picture_path, metavar="FILE.png", help="draw the spectra (.png, .pdf or .svg)")


def _init(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add)
    _choice_of_window(add)
    add.add_argument("--train", choices=TRAINED, default="both", help=_TRAIN)
    add.add_argument("--magnitude", type=magnitude, default="sigma", metavar="M", help=_MAGNITUDE)
    add.add_argument(
        "--form",
        choices=("intact", "residual"),
        default="intact",
        help="intact: an adapter for the original model (default); residual: a residual model and its adapter",
    )
    add.add_argument(
        "--tol",
        type=svd_tolerance,
        default="default",
        help="tolerance of the decomposition: fast, default, exact or a number",
    )
    add.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device of the decomposition (default cpu)"
    )
    which = add.add_mutually_exclusive_group()
    which.add_argument("--cache", type=path, metavar="DIR", help="cache decompositions here (default: $IPCA_CACHE)")
    which.add_argument("--no-cache", action="store_true", help="ignore $IPCA_CACHE and do not cache")
    _out(add)


def _merge(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add, adapter=True)
    _out(add)


def _export(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add, adapter=True)
    add.add_argument(
        "--format",
        choices=("peft", "serve", "mlx", "residual", "truncated"),
        default="peft",
        help="peft: a stock LoRA of twice the rank for the original model (default); serve: the same with one rank and "
        "scale 1, for vLLM, SGLang, llama.cpp, Ollama; mlx: for mlx-lm; residual: a residual model and a LoRA only for "
        "it; truncated: the nearest stock LoRA of --rank for the original model",
    )
    add.add_argument("--rank", type=positive_int, help="rank of --format truncated")
    _out(add)


def _convert(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add)
    add.add_argument("adapter", type=path, metavar="ADAPTER_DIR", help="a folder that PEFT's save_pretrained wrote")
    add.add_argument(
        "--original",
        type=path,
        metavar="MODEL_DIR",
        help="the original model, if MODEL_DIR is the residual base of a PiSSA adapter",
    )
    _out(add)


def _completion(add: argparse.ArgumentParser) -> None:
    _common(add, quiet=False)
    add.add_argument("shell", choices=SHELLS, help="the shell that will read the script")


def _cache(add: argparse.ArgumentParser) -> None:
    _with_examples(add)
    actions = add.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list every entry, the most recently used first")
    verify = actions.add_parser("verify", help="compare every entry with its checksum; status 1 if one is damaged")
    verify.add_argument("--remove", action="store_true", help="delete damaged entries")
    prune = actions.add_parser("prune", help="delete entries, the least recently used first")
    prune.add_argument("--max-bytes", type=byte_count, metavar="SIZE", help="until they take at most SIZE, such as 10G")
    prune.add_argument("--older-than", type=seconds, metavar="AGE", help="those not used for AGE, such as 30d")
    for action in (listing, verify, prune):
        _common(action)
        action.add_argument("--cache", type=path, metavar="DIR", help="default: $IPCA_CACHE, else ~/.cache/ipca")


def _doctor(add: argparse.ArgumentParser) -> None:
    _common(add)


def _tune(add: argparse.ArgumentParser) -> None:
    _common(add)
    _model(add, optional=True)
    add.add_argument(
        "--shapes", nargs="+", type=matrix_shape, metavar="OUTxIN", help="shapes of weights instead of a model's"
    )
    add.add_argument(
        "--rank", nargs="+", type=positive_int, default=[16], help="ranks, for the weights that take them (default 16)"
    )
    add.add_argument(
        "--tokens",
        nargs="+",
        type=positive_int,
        default=[1, 1024, 8192],
        metavar="M",
        help="tokens of a batch (default 1 1024 8192); the nearest one serves others",
    )
    add.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (default: the model's, or bfloat16)"
    )
    add.add_argument("--form", choices=("intact", "residual", "both"), default="both", help="(default both)")
    add.add_argument("--dropout", type=probability, default=0.0, metavar="P", help="(default 0)")
    add.add_argument("--force", action="store_true", help="measure again what was measured before")


def _sweep(add: argparse.ArgumentParser) -> None:
    _common(add)
    add.add_argument("task", type=path, metavar="TASK.py", help="a file whose task() returns an ipca.lab.sweep.Task")
    add.add_argument(
        "--windows",
        nargs="+",
        type=any_window,
        metavar="W",
        help="fractions or other windows (default 0.0 0.125 0.25 0.5 0.75 0.875 1.0)",
    )
    add.add_argument(
        "--lrs", nargs="+", type=positive_number, metavar="LR", help="learning rates (default 5e-4 1e-3 2e-3)"
    )
    add.add_argument("--seeds", type=positive_int, metavar="N", help="number of runs of each (default 8)")
    add.add_argument(
        "--methods",
        nargs="*",
        choices=("lora", "full", "auto", *BASELINES, *CONTROLS),
        metavar="METHOD",
        help=f"lora, full, auto, the baselines {', '.join(BASELINES)}, and the controls {', '.join(CONTROLS)} "
        "(default: lora and the controls)",
    )
    add.add_argument(
        "--comparisons",
        nargs="+",
        choices=COMPARISONS,
        metavar="NAME",
        help=f"{', '.join(COMPARISONS)} (default: all; same is required)",
    )
    add.add_argument(
        "--early", type=positive_int, metavar="STEPS", help="steps after which updates are compared (default 10)"
    )
    add.add_argument(
        "--checkpoints", nargs="+", type=positive_int, metavar="STEP", help="steps at which models are evaluated too"
    )
    add.add_argument(
        "--tune", type=positive_int, metavar="ROUNDS", help="rounds in which Optuna searches each method's best rate"
    )
    add.add_argument(
        "--accept-task-change", action="store_true", help="keep finished trials although TASK.py has changed since"
    )
    add.add_argument("--workers", type=positive_int, metavar="N", help="parallel processes (default 1)")
    add.add_argument("--threads", type=positive_int, metavar="N", help="threads of each process (default 1)")
    add.add_argument(
        "--devices",
        nargs="+",
        type=device,
        metavar="DEVICE",
        help="devices of the workers, assigned in turn: cuda:0 cuda:1",
    )
    add.add_argument(
        "--dry-run", action="store_true", help="print the trainings by method and stage, and their time; run nothing"
    )
    add.add_argument(
        "--example",
        nargs="?",
        const=TASK_EXAMPLES[0],
        choices=TASK_EXAMPLES,
        action=_PrintExample,
        help=f"print a TASK.py that runs as it is, and end: {', '.join(TASK_EXAMPLES)} (default {TASK_EXAMPLES[0]})",
    )
    _out(add)


class _PrintExample(argparse.Action):
    """Print an example of a task and end, like ``--version``."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        folder = Path(__file__).parents[1] / "lab" / "sweep" / "examples"
        sys.stdout.write((folder / f"{given[1]}.py").read_text(encoding="utf-8"))
        parser.exit()


def _report(add: argparse.ArgumentParser) -> None:
    _common(add)
    add.add_argument("sweeps", nargs="+", type=path, metavar="SWEEP", help="output folders of ipca sweep")
    add.add_argument("--labels", nargs="+", metavar="NAME", help="of the sweeps (default: the names of their folders)")
    add.add_argument(
        "-o",
        "--out",
        type=path,
        help="write report.html, figures/, tables/ and rows.csv here (default: only the "
        "report.html of a single SWEEP, again)",
    )
    add.add_argument(
        "--format",
        nargs="+",
        choices=PICTURES,
        metavar="FORMAT",
        help=f"of the figures: {', '.join(PICTURES)} (default: all)",
    )
    add.add_argument(
        "--force", action="store_true", help="write into an output folder that holds other files, which stay"
    )


def _demo(add: argparse.ArgumentParser) -> None:
    _common(add, quiet=False)
    add.add_argument(
        "--text",
        type=path,
        default=Path("vaderSentiment-3.3.2.tar.gz"),
        help="the source distribution of vaderSentiment 3.3.2 (default: in this folder)",
    )
    add.add_argument("--steps", type=positive_int, default=60, help="training steps (default 60)")
    add.add_argument(
        "--sentences", type=positive_int, default=200, help="held-out sentences, and sentences to keep (default 200)"
    )
    _out(add, default=Path("demo-out"))


def _common(parser: argparse.ArgumentParser, *, quiet: bool = True) -> None:
    _with_examples(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(quiet=False, fail=parser.error, status=0)
    if quiet:
        parser.add_argument(
            "--quiet", action="store_true", help="suppress everything but errors, warnings and --json output"
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _with_examples(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Show the examples of this command below its help; those of all commands below that of ``ipca``."""
    own = [f"  {example}" for example in _EXAMPLES if f"{parser.prog} " in example]
    parser.epilog = "\n".join(["examples:", *own, _NOTES])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _model(
    parser: argparse.ArgumentParser,
    *,
    adapter: bool = False,
    optional: bool = False,
    help: str = "a Hugging Face model: a folder or its id on the Hub",
) -> None:
    parser.add_argument("model", type=path, nargs="?" if optional else None, metavar="MODEL_DIR", help=help)
    parser.add_argument(
        "--class",
        dest="model_class",
        metavar="NAME",
        help="transformers class to load the model with (default: that of "
        + ("the adapter, else that of config.json)" if adapter else "config.json)"),
    )
    if adapter:
        parser.add_argument(
            "adapter", type=path, metavar="ADAPTER_DIR", help="a folder that save_adapter or ipca init wrote"
        )
        parser.add_argument(
            "--any-base", action="store_true", help="do not check that the adapter was made on this model"
        )


def _choice_of_window(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=positive_int, default=16, help="trained components of each layer (default 16)")
    parser.add_argument(
        "--window",
        type=window_start,
        default="middle",
        help="principal, middle (default), minor, a fraction such as 0.33, start=256, energy=0.9, or erank",
    )
    parser.add_argument("--alpha", type=positive_number, help="scaling × rank (default: rank)")
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="names, ends of names or regular expressions (default: all-linear)",
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="patterns to exclude")


def _out(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    text = "output folder" + (f" (default {default})" if default else "")
    parser.add_argument("-o", "--out", type=path, required=default is None, default=default, help=text)
    parser.add_argument(
        "--force", action="store_true", help="replace what the output folder holds; without, it is refused"
    )


def not_empty(text: str) -> str:
    """A path or an id on the Hub as given; ``""``, which a variable of the shell that is not set gives, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}; is a variable of the shell not set? The current folder is '.'")
    return text


def path(text: str) -> Path:
    """A path as given; ``Path("")`` would be the current folder."""
    return Path(not_empty(text))


def positive_int(text: str) -> int:
    """``"3"`` as an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """``"1e-3"`` as a finite float above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def non_negative_number(text: str) -> float:
    """``"0.5"`` as a finite float of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def share_or_path(text: str) -> float | str:
    """``"0.1"`` as a number between 0 and 1; anything else is the path of a file."""
    try:
        value = float(text)
    except ValueError:
        if not re.fullmatch(r"[\d.]+ *%", text):
            return not_empty(text)
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a share between 0 and 1, or a file; got {text!r}")
    return value


def probability(text: str) -> float:
    """``"0.05"`` as a float of at least 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text!r}")
    return value


def matrix_shape(text: str) -> tuple[int, int]:
    """``"11008x4096"`` as ``(out, in)``."""
    found = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be the sizes of a weight such as 11008x4096, got {text!r}")
    return int(found[1]), int(found[2])


def any_window(text: str) -> str:
    """A text form of :class:`ipca.Window`."""
    try:
        return Window(text, 1).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def window_start(text: str) -> str:
    """A text form of :class:`ipca.Window` that needs no inputs of the model."""
    start = any_window(text)
    if Window(start, 1).needs_calibration:
        raise argparse.ArgumentTypeError(
            f"{text!r} needs inputs of the model, which this command does not take; use another"
        )
    return start


def magnitude(text: str) -> float | str:
    """``"sigma"``, or a positive number."""
    return text if text == "sigma" else positive_number(text)


def svd_tolerance(text: str) -> float | str:
    """``"fast"``, ``"default"``, ``"exact"``, or a number."""
    from ipca.svd.decompose import TOLERANCES, tolerance  # not above: torch, which --help does not need

    try:
        value: float | str = text if text in TOLERANCES else float(text)
        tolerance(value)
    except ValueError:
        names = ", ".join(TOLERANCES)
        raise argparse.ArgumentTypeError(f"must be {names} or a number from 1e-12 to below 1, got {text!r}") from None
    return value


def device(text: str) -> str:
    """``"cuda:0"``, the name of a device of torch; whether this machine has it is found out later."""
    if re.fullmatch(r"[a-z]+(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"must be a device such as cpu or cuda:0, got {text!r}")
    return text


def picture_path(text: str) -> Path:
    """The path of a picture, in a format that can be drawn."""
    found = path(text)
    if found.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .pdf or .svg")
    return found


PATHS = (not_empty, path, picture_path, share_or_path)
"""The types of arguments that take a path."""


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
