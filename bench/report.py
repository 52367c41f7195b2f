"""Write the measured tables of README and docs from bench/results/*.csv; with --check say whether they are in step."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ipca.demo.report import read_rows, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def demo_section(path: Path) -> str:
    """The demo's table and a line on how it was measured."""
    rows = read_rows(path)
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    seconds = sum(float(row["seconds"]) for row in rows)
    settings = f"{first['steps']} steps of {first['batch']}, rank {first['rank']}, AdamW {float(first['lr']):g}"
    machine = f"{first['device']}, torch {first['torch']}, Python {first['python']}"
    return (
        f"{table(rows)}\n\n"
        f"Mean over {seeds} seeds (smallest … largest); {settings}; probe accuracy {float(first['probe_before']):.2f} "
        f"before. Measured on {machine}; {seconds:.0f} s for all runs. Rows: `bench/results/{path.name}`."
    )


def memory_section(path: Path) -> str:
    """Peak memory of apply_pc."""
    rows = read_rows(path)
    lines = ["| layers | d | form | peak, in largest layers in float64 |", "|---|---|---|---|"]
    lines += [f"| {row['layers']} | {row['d']} | {row['form']} | {row['peak_layers']} |" for row in rows]
    ranks = 'rank 16; in the rows "full" d / 2, which needs the full SVD'
    return "\n".join(lines) + f"\n\ntorch {rows[0]['torch']}, {ranks}. Rows: `bench/results/{path.name}`."


def render(text: str, sections: dict[str, str]) -> str:
    """``text`` with everything between its ``report`` markers made anew."""
    for name, section in sections.items():
        pattern = rf"(<!-- report:{name} -->\n).*?(<!-- /report:{name} -->)"
        text, count = re.subn(pattern, lambda m, s=section: f"{m[1]}{s}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the markers of report:{name} must stand once, found {count}.")
    return text


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of step")
    args = parser.parse_args()
    pages = {
        ROOT / "README.md": {"demo": demo_section(RESULTS / "demo.csv")},
        ROOT / "docs/method.md": {"memory": memory_section(RESULTS / "apply_memory.csv")},
    }
    stale = []
    for page, sections in pages.items():
        before = page.read_text()
        after = render(before, sections)
        if after != before:
            stale.append(page.name)
            if not args.check:
                page.write_text(after)
    if args.check and stale:
        print(f"{', '.join(stale)} out of step with bench/results; run: make report", file=sys.stderr)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
