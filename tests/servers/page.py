"""The page of what servers compute, from the rows."""

from __future__ import annotations

from tests.servers.servers import SERVERS, TOLERANCE, Row, read_rows


def page() -> str:
    """docs/results/servers.md."""
    rows = read_rows()
    by_server = {name: {row.adapter: row for row in rows if row.server == name} for name in SERVERS}
    adapters = list(dict.fromkeys(row.adapter for row in rows))
    lines = [
        "# Adapters in servers",
        "",
        "<!-- Generated from tests/servers/results.csv by `make servers`; do not edit. -->",
        "",
        "Largest difference of a log-probability (float32, all words, all positions of one text) between the live",
        "model and the server, which reads what `ipca export --format serve` or `--format mlx` wrote. The model is a",
        "LLaMA of two blocks with random weights, on a CPU. *base* has no adapter: the server's own arithmetic.",
        f"*Moved* is what the adapter changes. The tests allow {TOLERANCE:g}.",
        "",
        f"| adapter | moved | {' | '.join(_title(name, by_server[name]) for name in SERVERS)} |",
        "|---" * (2 + len(SERVERS)) + "|",
    ]
    for adapter in adapters:
        found = [by_server[name].get(adapter) for name in SERVERS]
        moved = next(row.moved for row in found if row)
        cells = [f"{row.difference:.1e}" if row else "not run" for row in found]
        lines.append(f"| {adapter} | {moved:.2g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _title(server: str, rows: dict[str, Row]) -> str:
    version = next(iter(rows.values())).version if rows else ""
    return f"{SERVERS[server]} {version}".strip()
