"""Write the measured tables of README and docs from bench/results/*.csv; with --check say whether they are in step."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench.facts import RESULTS, ROOT
from bench.plots import draw, draw_windows
from bench.quantized_start import PATH as QUANTIZED_START
from bench.quantized_start import overlap_section
from bench.quantized_start import section as quantized_start_section
from bench.result_tables import LEGEND, Row, against, compiled_lines, latest, pc_linear_table, training_table
from bench.svd_tables import LEGEND as WINDOW_LEGEND
from bench.svd_tables import against as windows_against
from bench.svd_tables import initialize_table, window_table
from ipca.lab.demo.report import read_rows, table
from studies.window_position.tables import sections as study_sections

NO_GPU = "No GPU result has been measured yet; what follows is a CPU."


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


def pc_linear_section(results: Path) -> str:
    """For each device the fused linear against a bare ``nn.Linear`` and PEFT, and where it loses."""
    parts = []
    for path in device_files(results, "pc_linear"):
        rows = latest(read_rows(path))
        lines = [*against(rows, most=3), *compiled_lines(rows)]
        parts += [
            f"{measured_on(rows[0])} Forward and backward of one layer; rows: `bench/results/{path.name}`.",
            pc_linear_table(rows),
            "\n".join(f"- {line}" for line in lines),
            f"![time over that of a bare nn.Linear](bench/results/{path.with_suffix('.png').name})",
        ]
    return "\n\n".join(gpu_or_not(results, "pc_linear") + [LEGEND] * bool(parts) + parts)


def training_section(results: Path) -> str:
    """For each device whole training steps, beside PEFT."""
    parts = []
    for path in device_files(results, "training"):
        rows = latest(read_rows(path))
        first = rows[0]
        model = f"{int(first['parameters']) / 1e6:.0f} M parameters, {first['layers']} layers of {first['hidden']}"
        steps = f"rank {first['rank']}, {first['batch']} × {first['length']} tokens a step"
        about = f"{measured_on(first)} A LLaMA-shaped model, {model}; {steps}; rows: `bench/results/{path.name}`."
        parts += [about, training_table(rows)]
    return "\n\n".join(gpu_or_not(results, "training") + parts)


def window_svd_section(results: Path) -> str:
    """For each device one window against full decompositions, whole models against PEFT, and where we lose."""
    parts: list[str] = []
    if not device_files(results, "window_svd"):
        return "Not measured yet."
    for path in device_files(results, "window_svd"):
        rows = latest(read_rows(path))
        lines = "\n".join(f"- {line}" for line in windows_against(rows, most=3))
        parts += [f"{measured_on(rows[0])} Rows: `bench/results/{path.name}`.", window_table(rows)]
        if any(row["op"] == "initialize" for row in rows):
            parts += ["A whole model of linear layers gets its adapter:", initialize_table(rows)]
        parts += [lines]
        if path.stem.endswith("_cpu"):
            parts += [f"![time over that of torch.linalg.svd](bench/results/{path.with_suffix('.png').name})"]
    return "\n\n".join(gpu_or_not(results, "window_svd") + [WINDOW_LEGEND] * bool(parts) + parts)


def device_files(results: Path, bench: str) -> list[Path]:
    """The CSV files of one bench, the CPU's last."""
    return sorted(results.glob(f"{bench}_*.csv"), key=lambda path: (path.stem.endswith("_cpu"), path.name))


def gpu_or_not(results: Path, bench: str) -> list[str]:
    """A first sentence where no GPU has been measured."""
    return [] if any(not path.stem.endswith("_cpu") for path in device_files(results, bench)) else [NO_GPU]


def measured_on(row: Row) -> str:
    """Device and versions, as a sentence."""
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton") if row[name])
    return f"**{row['device']}**, {row['dtype']}; {versions}, PEFT {row['peft']}, Python {row['python']}."


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
    study = study_sections(RESULTS / "study")
    pages = {
        ROOT / "README.md": {
            "demo": demo_section(RESULTS / "demo.csv"),
            "pc_linear": pc_linear_section(RESULTS),
            "training": training_section(RESULTS),
            "window_svd": window_svd_section(RESULTS),
            "study": study["study_findings"],
        },
        ROOT / "docs/window-svd.md": {"memory": memory_section(RESULTS / "apply_memory.csv")},
        ROOT / "docs/quantized.md": {
            "quantized_start": quantized_start_section(read_rows(RESULTS / QUANTIZED_START.name)),
            "quantized_windows": overlap_section(read_rows(RESULTS / QUANTIZED_START.name)),
        },
        ROOT / "docs/study.md": study,
    }
    stale = []
    for page, sections in pages.items():
        before = page.read_text()
        after = render(before, sections)
        if after != before:
            stale.append(page.name)
            if not args.check:
                page.write_text(after)
    if not args.check:
        for path in device_files(RESULTS, "pc_linear"):
            draw(read_rows(path), path.with_suffix(".png"))
        for path in device_files(RESULTS, "window_svd"):
            draw_windows(read_rows(path), path.with_suffix(".png"))
    if args.check and stale:
        print(f"{', '.join(stale)} out of step with bench/results; run: make report", file=sys.stderr)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
