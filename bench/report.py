"""Write the measured tables of README.md from bench/results/*.csv; with --check only say whether they are in step."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ipca.demo.report import read_rows, table

ROOT = Path(__file__).resolve().parent.parent


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


def render(text: str) -> str:
    """``text`` with everything between its ``report`` markers made anew."""
    for name, section in {"demo": demo_section(ROOT / "bench/results/demo.csv")}.items():
        pattern = rf"(<!-- report:{name} -->\n).*?(\n<!-- /report:{name} -->)"
        text, count = re.subn(pattern, lambda m, s=section: m[1] + s + m[2], text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"README.md must have the markers of report:{name} once, found {count}.")
    return text


def main() -> int:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is out of step")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if args.check:
        if after != before:
            print("README.md is out of step with bench/results; run: make report", file=sys.stderr)
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
