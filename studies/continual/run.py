"""Collect streams of PROTOCOL.md until none is left; a killed one is made again by the next ``make study-continual``.

    python -m studies.continual.run [--limit N]     add streams
    python -m studies.continual.run --how-far       what is there, and what remains

Several runners share a folder: each stream is made by one of them. A stream takes about 25 seconds of one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from studies.continual.design import CENTERS, order
from studies.continual.rows import RESULTS, Rows
from studies.continual.stream import base, one_stream
from studies.frontier.run import Runners, weights_sha256


def collect(rows: Rows, runners: Runners, limit: int | None = None, *, progress: bool = True) -> int:
    """Make streams in the protocol's order until none is left, or ``limit`` of them; returns their number.

    Raises:
        ValueError: the folder holds streams of another base model, or as :meth:`Rows.all`.
    """
    here, made = weights_sha256(base())[:12], 0
    if rows.model() not in (here, None):
        raise ValueError(
            f"{rows.folder} holds streams of another base model ({rows.model()}, here it is {here}): move the "
            "folder away, or restore digits-vit.safetensors of the study of the window's position"
        )
    with tqdm(desc="Streams", unit="stream", disable=not progress) as bar:
        while made != limit and _make_next(rows, runners):
            made += 1
            planned = list(order(rows.scores()))
            bar.total, bar.n = len(planned), sum(map(rows.has, planned))
            bar.refresh()
    return made


def _make_next(rows: Rows, runners: Runners) -> bool:
    """Make the first stream that is neither complete nor another runner's; False if there is none."""
    for run in order(rows.scores()):
        if rows.has(run):
            continue
        with runners.claim(run.key) as mine:
            if mine and not rows.has(run):  # it may have been completed since
                rows.put(run, one_stream(run))
                return True
    return False


def how_far(rows: Rows) -> str:
    """A table of complete and planned streams by method."""
    planned, scores = list(order(rows.scores())), rows.scores()
    lines = []
    for method in CENTERS:
        mine = [run for run in planned if run.method == method]
        rates = ", ".join(f"{rate:g}: {len(seeds)}" for rate, seeds in sorted(scores.get(method, {}).items()))
        lines.append(f"{method:12}{sum(map(rows.has, mine)):4}/{len(mine):<4}   {rates}")
    return "\n".join([*lines, f"{sum(map(rows.has, planned))} of {len(planned)} streams"])


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--work", type=Path, default=Path("study-out/continual"), help="folder of locks")
    parser.add_argument("--limit", type=int, help="stop after this many streams")
    parser.add_argument("--how-far", action="store_true", help="print what is complete and what remains")
    args = parser.parse_args()
    rows = Rows(args.results)
    if args.how_far:
        print(how_far(rows))
        return
    torch.set_num_threads(int(os.environ.get("STUDY_THREADS") or 1))
    try:
        made = collect(rows, Runners(args.work), args.limit)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{made} streams made; report them with: make study-page")


if __name__ == "__main__":
    main()
