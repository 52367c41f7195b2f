"""Registers, spills, shared memory and matrix instructions of every shipped kernel, compiled without a GPU.

    python -m bench.kernel_report

Writes bench/results/kernels.csv; exits with 1 if a kernel violates a limit.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.offline import Compiled, Row, compile_all

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.csv"
COLUMNS = (
    *("kernel", "variant", "config", "arch"),
    *("registers", "spills", "smem", "tmem", "matrix", "tma", "triton", "digest"),
)


def record(row: Row, triton: str) -> dict[str, str]:
    """One row of the table; a kernel that does not compile has no numbers."""
    named = {"kernel": row.kernel, "variant": row.variant, "config": row.config, "arch": f"sm_{row.arch}"}
    made = numbers(row.compiled) if row.compiled else {}
    return {**dict.fromkeys(COLUMNS, "-"), **named, **made, "triton": triton, "digest": row.digest}


def read_records() -> list[dict[str, str]]:
    """The rows of the table."""
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def recorded(record: Mapping[str, str]) -> Compiled | None:
    """The compiled kernel of a row, with only the recorded instructions as its code; None if it did not compile."""
    if record["registers"] == "-":
        return None
    registers, spills, smem, tmem = (int(record[name]) for name in ("registers", "spills", "smem", "tmem"))
    loads = "UTMALDG" if record["tma"] == "yes" else ""
    return Compiled(registers, spills, smem, tmem, f"{record['matrix']} {loads}")


def numbers(made: Compiled) -> dict[str, str]:
    """The columns from the compiler."""
    return {
        "registers": str(made.registers),
        "spills": str(made.spills),
        "smem": str(made.shared),
        "tmem": str(made.tensor_memory),
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="parallel compilers (default: 2)")
    rows = compile_all(workers=parser.parse_args().workers)
    import triton

    records = [record(row, triton.__version__) for row in rows]
    print_table(records)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    problems = [problem for row in rows for problem in row.problems()]
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
