"""Run the servers that are installed, and write rows and page: ``python -m tests.servers [NAME …]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from tests.servers.cases import write_cases
from tests.servers.page import page
from tests.servers.servers import PAGE, SERVERS, TOLERANCE, measure, python_of, write_rows


def main() -> int:
    """1 if an adapter is computed otherwise than by the live model."""
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SERVERS)}; default: what is installed")
    names = parser.parse_args().names or [name for name in SERVERS if python_of(name)]
    missing = [name for name in names if name not in SERVERS or not python_of(name)]
    if missing or not names:
        parser.error(f"not installed: {', '.join(missing or SERVERS)}; make servers SERVERS=NAME installs one.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_cases(Path(folder))
        for name in tqdm(names, unit="server", disable=None):
            rows += measure(name, Path(folder))
    for row in rows:
        print(f"{SERVERS[row.server]:12}{row.adapter:24} moved {row.moved:8.2g}   off by {row.difference:.1e}")
    write_rows(rows)
    PAGE.write_text(page(), encoding="utf-8")
    return int(any(row.difference > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
