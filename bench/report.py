"""Write the pages of measured results, docs/results/{benchmarks,fine-tuning,baselines}.md, from bench/results/*.csv.

    python -m bench.report [--check]

All pages are generated completely.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.plots import draw, draw_windows
from bench.quantized_start import PATH as QUANTIZED_START
from bench.quantized_start import overlap_section, start_section
from bench.result_tables import (
    LEGEND,
    Row,
    against,
    compiled_lines,
    latest,
    overhead_table,
    pc_linear_table,
    training_table,
    versus_peft_table,
)
from bench.rows import RESULTS, ROOT, read_rows
from bench.svd_grid import OPS
from bench.svd_tables import FIRST, FIRST_LEGEND, first_table, initialize_table, window_table
from bench.svd_tables import LEGEND as WINDOW_LEGEND
from bench.svd_tables import against as windows_against

NO_GPU = "No GPU has been measured yet; the following results are from a CPU."
NOT_AS_IN_THE_PAPERS = """\
- **MiCA and KaSA** are compared with the formulas that PEFT documents, not with the papers themselves. KaSA's
  regularizers are part of the check; in training they count only where the loop adds
  `ipca.lab.baselines.penalty(model)`.
- **OSF** protects the same share of every layer, PEFT's default of one half, where the paper sizes it by the layer's
  importance. The check is with plain SGD: Adam does not keep the projection ([continual learning](../continual.md)).
- **OFT** uses the exact Cayley transform. PEFT's default is a series of five terms, whose `R` is orthogonal only for
  small rotations.
- **CorDA** takes PEFT's covariance, in which each batch is divided by its largest input. Padding counts as input.
- **OPLoRA**: how many components are protected is the paper's parameter `k`; here it is the rank.
- **LoRA-Null** is the version that trains both factors. The second one freezes the lower factor.
- **L2 to the start** decays after the step, where AdamW decays before it.
- **SC-LoRA** (arXiv 2505.23724) is missing: it needs a second set of inputs, which no other method does."""
PICTURES = "../../bench/results"
"""The folder of the figures, relative to the pages."""
GENERATED = "<!-- Generated from bench/results by `make report`; do not edit. -->"


def benchmarks_page(results: Path) -> str:
    """The page on speed and memory, and on what quantization loses."""
    quantized = read_rows(results / QUANTIZED_START.name)
    parts = [
        "# Benchmarks",
        GENERATED,
        "How each table is measured: [bench/README.md](../../bench/README.md). `make results` measures them again.",
        "## Fused linear",
        pc_linear_section(results),
        "## Every small layer against PEFT's default, on a CPU",
        versus_peft_section(results / "versus_peft_cpu.csv"),
        "## Digits of the trained change",
        "The intact form after its factors have moved a little: relative errors against float64 (Frobenius).",
        change_error_section(results / "change_error.csv"),
        "## Training steps",
        "Whole training steps of a LLaMA-shaped model with all linear layers of its blocks adapted.",
        training_section(results),
        "## Training steps of small models",
        "Random weights, float32; the fewer tokens, the more does the time per layer decide, not the products.",
        small_models_section(results / "small_models_cpu.csv"),
        "## Window SVD",
        "One window of singular components against full and partial decompositions.",
        window_svd_section(results),
        "## Starting from singular vectors",
        "Seconds until a model with random weights has its adapter, beside PEFT's own starts of that kind.",
        start_table(results / "start_cpu.csv"),
        "## Memory of `apply_pc`",
        "Peak memory above the model, in units of the largest layer in float64.",
        memory_section(results / "apply_memory.csv"),
        "## Loading adapters",
        "An adapter for linear layers of the shapes of Llama-3.2-1B, 7 in each of 16 layers, beside stock PEFT, which "
        "checks neither its file nor the base.",
        adapter_section(results / "adapter_load.csv"),
        "## `ipca init` of a large checkpoint",
        "A random checkpoint in bfloat16 with layers of the shapes of LLaMA-2-7B, in shards.",
        init_section(results / "init_checkpoint.csv"),
        "## Windows of quantized weights",
        "Overlap of the window of `W` with that of `Q(W)`: `‖V_wᵀ V'_w‖_F² / rank` of their right singular vectors; 1 "
        "if they span the same subspace, rank / d by chance.",
        overlap_section(quantized),
        "## Quantized residual weights",
        "Error of the weight at the start of training if the residual weight is quantized, relative to that of "
        "quantizing `W`: `‖W − (Q(W_res) + B0 A0)‖ / ‖W − Q(W)‖`, by window and rank.",
        start_section(quantized),
    ]
    return "\n\n".join(parts) + "\n"


def fine_tuning_page(results: Path) -> str:
    """The page on runs of ``ipca train``: one of a language model."""
    parts = [
        "# Fine-tuning runs",
        GENERATED,
        "## A language model learns German",
        german_section(results),
    ]
    return "\n\n".join(parts) + "\n"


def baselines_page(results: Path) -> str:
    """The page on the baselines' checks against their sources."""
    rows = read_rows(results / "baseline_checks.csv")
    parts = [
        "# Baselines against their sources",
        GENERATED,
        "Each baseline of `ipca.lab.baselines` on one layer of 12 × 20 in float32, rank 3, five steps of SGD, beside "
        "PEFT in stock usage or the paper's formula in float64 NumPy with gradients written by hand. The difference is "
        "the largest one of an entry, relative to the largest entry, unless the table says otherwise.",
        checks_table(rows),
        f"torch {rows[0]['torch']}, PEFT {rows[0]['peft']}, {rows[0]['device']}. Rows: "
        "`bench/results/baseline_checks.csv`; `python -m bench.baseline_checks` makes them again.",
        "## What differs from the papers",
        NOT_AS_IN_THE_PAPERS,
    ]
    return "\n\n".join(parts) + "\n"


def checks_table(rows: Sequence[Row]) -> str:
    """A line for each check."""
    lines = ["| baseline | source | compared | largest difference | tolerance |", "|---|---|---|---|---|"]
    lines += [
        f"| {' | '.join(row[name] for name in ('baseline', 'source', 'compared', 'difference', 'tolerance'))} |"
        for row in rows
    ]
    return "\n".join(lines)


def german_section(results: Path) -> str:
    """The curve of a run and its trade-off, with what they say about stopping early."""
    curve, scales = (read_rows(results / name) for name in ("german_curve.csv", "german_tradeoff.csv"))
    first = curve[0]
    how = (
        f"SmolLM2-135M, all linear layers, window `{first['window']}`, rank {first['rank']}, {first['steps']} steps of "
        f"{first['batch']} × {first['max_length']} tokens of German manual pages, AdamW with a peak rate of "
        f"{float(first['rate']):g}; kept: {first['keep_tokens']} tokens of English newspaper editorials. One run, one "
        "seed, one rate: an example of the instruments, not a comparison of methods. "
        f"{first['device']}, torch {first['torch']}, {int(first['seconds']) / 60:.0f} minutes, with "
        f"{int(scales[0]['seconds']) / 60:.0f} for the trade-off."
    )
    lines = [
        "| step | held-out loss, German | KL(base ‖ tuned), English | rise of the loss, English |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {float(row['step']):.0f} | {float(row['eval_loss']):.3f} | {float(row['eval_keep_kl']):.3f} | "
        f"{float(row['eval_keep_loss_rise']):+.3f} |".replace("-", "−")
        for row in curve
    ]
    more = ["| scale λ of the final change | held-out loss, German | KL, English |", "|---|---|---|"]
    more += [f"| {float(r['scale']):g} | {float(r['loss']):.3f} | {float(r['forgotten']):.3f} |" for r in scales]
    return "\n\n".join(
        [
            how,
            "\n".join(lines),
            f"![loss and KL by step]({PICTURES}/german_curve.png)",
            "`ipca tradeoff` scales the final change:",
            "\n".join(more),
            f"![loss against KL along the scale]({PICTURES}/german_tradeoff.png)",
            scaling_against_stopping(curve, scales),
            "Rows: `bench/results/german_curve.csv`, `german_tradeoff.csv`; `python -m bench.fine_tuning` makes them "
            "again.",
        ]
    )


def scaling_against_stopping(curve: list[Row], scales: list[Row]) -> str:
    """The checkpoint and the scale with the lowest loss among those with no more KL than a trained checkpoint."""
    stopped = next(row for row in curve if float(row["step"]) > 0)
    limit = float(stopped["eval_keep_kl"])
    within = [row for row in scales if float(row["forgotten"]) <= limit]
    best = min(within, key=lambda row: float(row["loss"]))
    return (
        f"Stopped at step {float(stopped['step']):.0f}, while its rate was still high, the run has a KL of "
        f"{limit:.3f} and a loss of {float(stopped['eval_loss']):.3f}; the whole run scaled by "
        f"{float(best['scale']):g} has a KL of {float(best['forgotten']):.3f} and a loss of "
        f"{float(best['loss']):.3f}. The two tables evaluate passes of other sizes, whose means differ a little, as "
        "those of the base do."
    )


def memory_section(path: Path) -> str:
    """Peak memory of ``apply_pc``."""
    rows = read_rows(path)
    lines = ["| layers | d | form | peak, in largest layers in float64 |", "|---|---|---|---|"]
    lines += [f"| {row['layers']} | {row['d']} | {row['form']} | {row['peak_layers']} |" for row in rows]
    ranks = 'rank 16; d / 2 in the rows "wide"'
    return "\n".join(lines) + f"\n\ntorch {rows[0]['torch']}, {ranks}. Rows: `bench/results/{path.name}`."


def versus_peft_section(path: Path) -> str:
    """Training, decoding and calls of small layers, against stock LoRA."""
    rows = latest(read_rows(path))
    about = (
        "Times are medians of paired rounds; ratios up to 1.02 are ties. Beside the 2 K N multiplications of "
        "the frozen weight, a training step takes 3 r (K + N) a token for LoRA and for the residual form, and "
        "5 r (K + N) for the intact one: where r is a large part of the width, that must be slower. A merged layer has "
        "the plain price."
    )
    machine = measured_on(rows[0], threads=False)
    tables = [versus_peft_table(rows), overhead_table(rows)]
    return "\n\n".join([*tables, f"{machine} {about} Rows: `bench/results/{path.name}`."])


def change_error_section(path: Path) -> str:
    """Errors of output, change and gradients, as the formula is written and in one product."""
    rows = read_rows(path)
    lines = [
        "| weight | factors moved by | computed as | output | `y − base` | dx, dA, dB | base's bits at the start |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        gradients = f"{row['dx']}, {row['dA']}, {row['dB']}"
        cells = [row["dtype"], f"{float(row['moved']):.2%}", row["computed"], row["output"], row["change"], gradients]
        lines.append(f"| {' | '.join([*cells, row['bits']])} |")
    about = "Factors in float32, moved by a share of their standard deviation. *Two products*: `x Aᵀ Bᵀ − x A0ᵀ B0ᵀ`."
    versions = f"torch {rows[0]['torch']}, {rows[0]['device']}"
    return "\n".join(lines) + f"\n\n{about} {versions}. Rows: `bench/results/{path.name}`."


def small_models_section(path: Path) -> str:
    """Training steps of small models, against stock LoRA."""
    rows = read_rows(path)
    first = rows[0]
    lines = [
        "| model, tokens | threads | trained with | ms a step | over stock LoRA, median (quartiles) "
        "| reading `weight.dtype`, µs |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        name, quartiles = f"{row['provider']} {row['form']}".strip(), f"{row['ratio_low']} … {row['ratio_high']}"
        what = f"{row['model']}, {row['batch']} × {row['length']}"
        cells = [what, row["device"].split()[-2], name, row["step_ms"], f"{row['ratio']} ({quartiles})"]
        lines += [f"| {' | '.join([*cells, row['read_dtype_us']])} |"]
    machine = measured_on(first, threads=False)
    about = f"Rank {first['rank']}, {first['rounds']} rounds."
    return "\n".join(lines) + f"\n\n{machine} {about} Rows: `bench/results/{path.name}`."


def start_table(path: Path) -> str:
    """Seconds until a model is adapted, on a quiet machine and beside a busy process."""
    rows = read_rows(path)
    busy = {(row["model"], row["provider"], row["window"]): row for row in rows if row["beside"] != "nothing"}
    lines = ["| model, layers adapted | start | window | s | over `pissa` (quartiles) | beside a busy process, s | × |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["beside"] == "nothing"):
        beside = busy.get((row["model"], row["provider"], row["window"]), {"seconds": "–", "over_quiet": "–"})
        ratio = f"{row['ratio']} ({row['ratio_low']} … {row['ratio_high']})"
        cells = [f"{row['model']}, {row['layers']}", row["provider"], row["window"], row["seconds"], ratio]
        lines.append(f"| {' | '.join([*cells, beside['seconds'], beside['over_quiet']])} |")
    about = (
        "`pissa` and `pissa_niter_16`: PEFT's `init_lora_weights`, of which the second finds the principal window by a "
        "randomized SVD without a proof. Times are medians of rounds in which all take their turn. The busy process "
        "has two threads that multiply; a program that gets half of two cores takes twice its time."
    )
    rounds = ", ".join(dict.fromkeys(row["rounds"] for row in rows))
    machine = f"{measured_on(rows[0])} Rank {rows[0]['rank']}; {rounds} rounds."
    return "\n".join(lines) + f"\n\n{machine} {about} Rows: `bench/results/{path.name}`."


def adapter_section(path: Path) -> str:
    """Seconds to load an adapter, beside PEFT."""
    rows = read_rows(path)
    first = rows[0]
    lines = ["| operation | base | device | seconds, median | quartiles | ratio to PEFT |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['op']} | {row['dtype']} | {row['device']} | {row['median_s']} | {row['q25_s']}–{row['q75_s']} "
        f"| {row['ratio']} |"
        for row in rows
    ]
    about = f"{first['matrices']} matrices of the model, rank {first['rank']}, a file of {first['file_mib']} MiB"
    machine = f"torch {first['torch']}, PEFT {first['peft']}"
    return "\n".join(lines) + f"\n\n{about}; {first['rounds']} rounds, {machine}. Rows: `bench/results/{path.name}`."


def init_section(path: Path) -> str:
    """Time and memory of ``ipca init``."""
    rows = read_rows(path)
    first = rows[0]
    lines = ["| run | form | processes | matrices | seconds | CPU | over one process: wall, CPU | peak, MiB |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        made = int(row["matrices"]) - int(row["finished_before"])
        gain = f"{row['speedup']}, {row['cpu_speedup']}" if row["speedup"] else ""
        times = (row["seconds"], row["cpu_s"], gain)
        lines.append(
            f"| {' | '.join([row['op'], row['form'], row['processes'], str(made), *times, row['peak_mib']])} |"
        )
    size = "1 layer" if first["layers"] == "1" else f"{first['layers']} layers"
    about = (
        f"{size} of the model, window {first['window']}, rank {first['rank']}; a core and a thread for each process. "
        "Seconds from start to end, imports included; CPU seconds and peak of the process that has most. The largest "
        f"weight takes {first['largest_mib']} MiB; 4 of it and 1 GiB are {first['limit_mib']} MiB."
    )
    machine = f"{first['device'].split(',')[0]}, torch {first['torch']}"
    return "\n".join(lines) + f"\n\n{about} {machine}. Rows: `bench/results/{path.name}`."


def pc_linear_section(results: Path) -> str:
    """For each device, the fused linear against a bare ``nn.Linear`` and PEFT, and the cells where it is slower."""
    parts = []
    for path in device_files(results, "pc_linear"):
        rows = latest(read_rows(path))
        lines = [*against(rows, most=3), *compiled_lines(rows)]
        parts += [
            f"{measured_on(rows[0])} Forward and backward of one layer; rows: `bench/results/{path.name}`.",
            pc_linear_table(rows),
            "\n".join(f"- {line}" for line in lines),
            f"![time over that of a bare nn.Linear]({PICTURES}/{path.with_suffix('.png').name})",
        ]
    return "\n\n".join(gpu_note(results, "pc_linear") + [LEGEND] * bool(parts) + parts)


def training_section(results: Path) -> str:
    """For each device, whole training steps against PEFT."""
    parts = []
    for path in device_files(results, "training"):
        rows = latest(read_rows(path))
        first = rows[0]
        model = f"{int(first['parameters']) / 1e6:.0f} M parameters, {first['layers']} layers of {first['hidden']}"
        steps = f"rank {first['rank']}, {first['batch']} × {first['length']} tokens a step"
        about = f"{measured_on(first)} A LLaMA-shaped model, {model}; {steps}; rows: `bench/results/{path.name}`."
        parts += [about, training_table(rows)]
    return "\n\n".join(gpu_note(results, "training") + parts)


def window_svd_section(results: Path) -> str:
    """For each device, one window against full decompositions, whole models against PEFT, and the slower cases."""
    parts: list[str] = []
    if not device_files(results, "window_svd"):
        return "Not measured yet."
    for path in device_files(results, "window_svd"):
        rows = latest(read_rows(path))
        if unknown := {row["op"] for row in rows}.difference(OPS):
            raise ValueError(f"{path.name} has rows of {', '.join(sorted(unknown))}, which no table would show.")
        lines = "\n".join(f"- {line}" for line in windows_against(rows, most=3))
        parts += [f"{measured_on(rows[0])} Rows: `bench/results/{path.name}`.", window_table(rows)]
        if any(row["provider"] in FIRST for row in rows):
            parts += [FIRST_LEGEND, first_table(rows)]
        if any(row["op"] == "initialize" for row in rows):
            parts += ["A whole model of linear layers gets its adapter:", initialize_table(rows)]
        parts += [lines]
        if path.stem.endswith("_cpu"):
            parts += [f"![time over that of torch.linalg.svd]({PICTURES}/{path.with_suffix('.png').name})"]
    return "\n\n".join(gpu_note(results, "window_svd") + [WINDOW_LEGEND] * bool(parts) + parts)


def device_files(results: Path, bench: str) -> list[Path]:
    """The CSV files of one bench, that of the CPU last."""
    return sorted(results.glob(f"{bench}_*.csv"), key=lambda path: (path.stem.endswith("_cpu"), path.name))


def gpu_note(results: Path, bench: str) -> list[str]:
    """A first sentence if no GPU has been measured."""
    return [] if any(not path.stem.endswith("_cpu") for path in device_files(results, bench)) else [NO_GPU]


def measured_on(row: Row, *, threads: bool = True) -> str:
    """Device and versions, as a sentence; without the number of ``threads`` where a table has that."""
    device = row["device"] if threads else row["device"].split(",")[0]
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton") if row[name])
    return f"**{device}**, {row['dtype']}; {versions}, PEFT {row['peft']}, Python {row['python']}."


def main() -> int:
    """Write the pages and figures; with ``--check`` change nothing, and return 1 if a page is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    args = parser.parse_args()
    folder = ROOT / "docs" / "results"
    pages = {"benchmarks.md": benchmarks_page(RESULTS), "fine-tuning.md": fine_tuning_page(RESULTS)}
    pages["baselines.md"] = baselines_page(RESULTS)
    if args.check:
        old = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
        stale = [name for name, text in pages.items() if old.get(name) != text]
        if stale:
            print(f"{', '.join(stale)} out of date; run: make report", file=sys.stderr)
        return int(bool(stale))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in device_files(RESULTS, "pc_linear"):
        draw(read_rows(path), path.with_suffix(".png"))
    for path in device_files(RESULTS, "window_svd"):
        draw_windows(read_rows(path), path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
