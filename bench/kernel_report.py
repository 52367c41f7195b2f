"""Registers, spills, shared memory and matrix instructions of every shipped kernel, compiled without a GPU.

    python -m bench.kernel_report .tritons/3.6.0 .tritons/3.9.0

Each folder holds a version of Triton (``pip install --target``); `make kernels` makes those of the oldest, the tested
and the newest one. Writes bench/results/kernels.csv after each, and compiles only what is not in it; exits with 1 if a
kernel violates a limit.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from bench.offline import Compiled, Row, compile_all

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.csv"
COLUMNS = (
    *("kernel", "variant", "config", "arch"),
    *("registers", "spills", "smem", "tmem", "after loop", "matrix", "tma", "triton", "digest"),
)


def record(row: Row, triton: str) -> dict[str, str]:
    """One row of the table; a kernel that does not compile has no numbers."""
    named = {"kernel": row.kernel, "variant": row.variant, "config": row.config, "arch": f"sm_{row.arch}"}
    made = numbers(row.compiled) if row.compiled else {}
    return {**dict.fromkeys(COLUMNS, "-"), **named, **made, "triton": triton, "digest": row.digest}


def read_records(triton: str | None = None) -> list[dict[str, str]]:
    """The rows of the table, or those of one version of Triton."""
    with RESULTS.open(newline="") as file:
        return [line for line in csv.DictReader(file) if triton in (None, line["triton"])]


def recorded(record: Mapping[str, str]) -> Compiled | None:
    """The compiled kernel of a row, with only the recorded instructions as its code; None if it did not compile."""
    if record["registers"] == "-":
        return None
    registers, spills, smem, tmem = (int(record[name]) for name in ("registers", "spills", "smem", "tmem"))
    after_loop = None if record["after loop"] == "-" else int(record["after loop"])
    loads = "UTMALDG" if record["tma"] == "yes" else ""
    return Compiled(registers, spills, smem, tmem, after_loop, f"{record['matrix']} {loads}")


def numbers(made: Compiled) -> dict[str, str]:
    """The columns from the compiler."""
    return {
        "registers": str(made.registers),
        "spills": str(made.spills),
        "smem": str(made.shared),
        "tmem": str(made.tensor_memory),
        "after loop": "-" if made.after_loop is None else str(made.after_loop),
        "matrix": " ".join(sorted(made.matrix_instructions)) or "none",
        "tma": "yes" if made.uses_tma else "no",
    }


def print_table(records: list[dict[str, str]]) -> None:
    """Print the records in aligned columns."""
    lines = [COLUMNS, *(tuple(record.values()) for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tritons", nargs="+", metavar="folder", help="a version of Triton")
    parser.add_argument("--workers", type=int, default=2, help="parallel compilers (default: 2)")
    given = parser.parse_args()
    versions = {folder: version_in(folder) for folder in given.tritons}
    table = [line for line in read_records() if line["triton"] in versions.values()]
    problems = []
    for folder, version in versions.items():
        known = {line["digest"]: made for line in table if line["triton"] == version and (made := recorded(line))}
        rows = compile_all(workers=given.workers, known=known, triton=folder)
        records = [record(row, version) for row in rows]
        print_table(records)
        table = [line for line in table if line["triton"] != version] + records
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        problems += [f"triton {version} | {problem}\n" for row in rows for problem in row.problems()]
    sys.stderr.writelines(problems)
    return int(bool(problems))


def version_in(folder: str) -> str:
    """The version of Triton that ``folder`` holds."""
    for found in distributions(name="triton", path=[folder]):
        return found.version
    raise SystemExit(f"{folder} holds no triton: run `make kernels`.")


if __name__ == "__main__":
    sys.exit(main())
