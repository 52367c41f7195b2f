"""``ipca train`` and ``ipca tradeoff`` on a real language model: SmolLM2-135M learns German from manual pages.

    python -m bench.fine_tuning [--steps N]

Half an hour on two CPU cores. It needs the model and the texts of the language study, which `make study-language`
downloads. The rows are those of one run with one rate and one seed: an example, not a comparison.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.rows import FACTS, RESULTS, append_rows, facts
from ipca.lab.demo.data import read_sentences
from ipca.train.evaluation import open_adapter
from ipca.train.figures import draw_run, draw_tradeoff
from ipca.train.run import fine_tune
from ipca.train.scaled_change import tradeoff
from ipca.train.settings import TrainSettings
from studies.language.model import model_folder
from studies.language.texts import archive_path, man_pages

CURVE, TRADEOFF = "german_curve.csv", "german_tradeoff.csv"
BUDGET = 0.1
"""Of the trade-off, in nats per token."""
_PAGE, _TRAINED, _HELD_OUT, _LEAST = 4000, 160, range(200, 208), 1000
"""Characters of a page, pages to train on, pages held out, and characters of the shortest."""
_SETTINGS = ("window", "rank", "rate", "batch", "max_length", "keep_tokens", "seed")


def write_texts(folder: Path) -> None:
    """``german.txt``, ``german-test.txt`` and ``english.txt``: manual pages, and newspaper editorials to keep."""
    pages = {page[:_PAGE] for page in man_pages() if len(page) >= _LEAST}
    ordered = sorted(pages, key=lambda page: hashlib.sha256(page.encode()).digest())
    (folder / "german.txt").write_text("\n\n".join(ordered[:_TRAINED]), encoding="utf-8")
    held_out = "\n\n".join(ordered[k] for k in _HELD_OUT)
    (folder / "german-test.txt").write_bytes(held_out.encode()[:14_000])
    english = " ".join(text for _, text in read_sentences(archive_path())["NYT"])
    (folder / "english.txt").write_text(english, encoding="utf-8")


def settings(folder: Path, steps: int) -> TrainSettings:
    """Of the run."""
    return TrainSettings(
        str(model_folder()),
        str(folder / "german.txt"),
        held_out=str(folder / "german-test.txt"),
        keep=str(folder / "english.txt"),
        keep_tokens=4096,
        max_length=128,
        batch=4,
        steps=steps,
        evaluations=6,
    )


def main() -> None:
    """Train, trade, and write the rows and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of the training (default 120)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_texts(place)
        began = time.perf_counter()
        chosen = settings(place, args.steps)
        outcome = fine_tune(chosen, place / "german")
        common = {"steps": args.steps, **{each: getattr(chosen, each) for each in _SETTINGS}}
        common |= {"seconds": f"{time.perf_counter() - began:.0f}", **facts(torch.device("cpu"))}
        write(args.out / CURVE, outcome.rows, common)
        draw_run(outcome.rows, args.out / "german_curve.png", outcome.best, "keep_kl", outcome.description, None)
        began = time.perf_counter()
        held_out = TrainSettings(**{**chosen.to_dict(), "data": chosen.held_out, "held_out": 0.1, "batch": 8})
        with open_adapter(held_out, place / "german") as (trainer, kept):
            assert kept is not None
            found = tradeoff(trainer, kept, max_forgotten=BUDGET)
        common["seconds"] = f"{time.perf_counter() - began:.0f}"
        write(args.out / TRADEOFF, found.rows(), common)
        draw_tradeoff(found.rows(), args.out / "german_tradeoff.png", found.description, found.best.scale)


def write(path: Path, rows: list[dict[str, float]], common: dict[str, Any]) -> None:
    """Replace ``path`` by ``rows``, each with the settings and the facts of the run."""
    path.unlink(missing_ok=True)
    columns = [*dict.fromkeys(name for row in rows for name in row), "steps", *_SETTINGS, "seconds", *FACTS]
    append_rows(path, [{**row, **common} for row in rows], columns)


if __name__ == "__main__":
    main()
