"""``ipca init`` on a random checkpoint in bfloat16 with layers of the shapes of LLaMA-2-7B: time, memory, processes.

    python -m bench.init_checkpoint

Writes bench/results/init_checkpoint.csv. One process on one core, two on a core each, as torchrun starts them, one
that is killed at its first finished matrix and started again; all must write the same factors. Random weights have no
gap in their spectrum, which is the hard case of the decomposition.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.rows import FACTS, RESULTS, Row, append_rows, facts
from ipca.io.adapter_folder import SIDECAR
from ipca.io.peft_format import WEIGHTS
from ipca.offline.work_folder import WORK

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 4096, 11008, 32000, 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
RUNS = (("intact", "init", 1), ("intact", "init", 2), ("intact", "killed and resumed", 1), ("residual", "init", 1))
"""Form, what is done, number of processes; the first of a form is what the others are compared with."""
COMMAND = """
import sys, time
from pathlib import Path
from ipca.cli.main import main
status = main()
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), time.process_time())
sys.exit(status)
"""
"""``ipca``, and in a last line its peak memory in KiB, which wait4 mixes with the parent's, and CPU seconds."""
COLUMNS = (
    *("op", "form", "window", "rank", "layers", "matrices", "processes", "finished_before", "seconds"),
    *("layer_s", "svd_s", "cpu_s", "peak_mib", "largest_mib", "limit_mib", "speedup", "cpu_speedup", *FACTS),
)


def write_checkpoint(folder: Path, layers: int) -> None:
    """A model folder with one shard for the embeddings and one for each layer; weights of variance 1 / in."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def normal(out: int, inner: int) -> torch.Tensor:
        return (torch.randn(out, inner, generator=generator) / inner**0.5).bfloat16()

    places: dict[str, str] = {}
    for shard in range(layers + 1):
        if shard < layers:
            prefix = f"model.layers.{shard}"
            tensors = {f"{prefix}.{name}.weight": normal(*shape) for name, shape in SHAPES.items()}
            norms = [f"{prefix}.{name}_layernorm.weight" for name in ("input", "post_attention")]
        else:
            names, norms = ("model.embed_tokens", "lm_head"), ["model.norm.weight"]
            tensors = {f"{name}.weight": normal(VOCABULARY, HIDDEN) for name in names}
        tensors |= {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
        file = f"model-{shard + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY}
    config |= {"num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def start(arguments: Sequence[str], rank: int, size: int, core: int) -> subprocess.Popen[str]:
    """Process ``rank`` of ``size`` of ``ipca init``, on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    command = ["taskset", "--cpu-list", str(core), sys.executable, "-c", COMMAND, "init", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def run(arguments: Sequence[str], processes: int) -> dict[str, Any]:
    """Run the command to its end: its record, seconds, and CPU seconds and peak memory of the hungriest process."""
    began = time.perf_counter()
    cores = sorted(os.sched_getaffinity(0))
    started = [start(arguments, rank, processes, cores[rank % len(cores)]) for rank in range(processes)]
    printed = [process.communicate()[0].splitlines() for process in started]
    seconds = time.perf_counter() - began
    assert not any(process.returncode for process in started), "ipca init failed"
    peaks, cpu = zip(*(map(float, lines[-1].split()) for lines in printed), strict=True)
    return {
        **json.loads("".join(printed[0][:-1])),
        "seconds": seconds,
        "cpu_s": max(cpu),
        "peak_mib": max(peaks) / 1024,
    }


def kill_at_first(arguments: Sequence[str], out: Path) -> None:
    """Start the command, and kill it as soon as a matrix is finished."""
    process = start(arguments, 0, 1, min(os.sched_getaffinity(0)))
    while not list((out / WORK / "layers").glob("*.safetensors")):
        assert process.poll() is None, "ipca init has ended before it could be killed"
        time.sleep(0.05)
    process.kill()
    process.communicate()


def main() -> int:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of the model (default: 2)")
    parser.add_argument("--rank", type=int, default=16, help="(default: 16)")
    parser.add_argument("--window", default="middle", help="(default: middle)")
    parser.add_argument("--out", type=Path, default=RESULTS / "init_checkpoint.csv", help="CSV file, overwritten")
    parser.add_argument(
        "--folder", type=Path, help="for the checkpoint, on a disk with room (default: a temporary one)"
    )
    args = parser.parse_args()
    args.out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        place = Path(name)
        write_checkpoint(place / "model", args.layers)
        alone: dict[str, dict[str, Any]] = {}
        for form, op, processes in RUNS:
            out = place / "out"
            options = ["--window", args.window, "--rank", str(args.rank), "--form", form]
            arguments = [str(place / "model"), *options, "--json", "-o", str(out)]
            if op != "init":
                kill_at_first(arguments, out)
            found = run(arguments, processes)
            found["files"] = adapter_bytes(out)
            first = alone.setdefault(form, found)
            assert found["files"] == first["files"], "the factors are not those of one process"
            row = row_of(found, first, args) | {"op": op, "form": form, "processes": processes}
            append_rows(args.out, [row], COLUMNS)
            print({name: row[name] for name in COLUMNS[: -len(FACTS)]}, flush=True)
            shutil.rmtree(out)
    return 0


def adapter_bytes(out: Path) -> bytes:
    """The file of factors."""
    folder = out if (out / SIDECAR).is_file() else out / "adapter"
    return (folder / WEIGHTS).read_bytes()


def row_of(found: dict[str, Any], alone: dict[str, Any], args: argparse.Namespace) -> Row:
    """The columns that are measured, and those of the checkpoint; the limit is 4 of the largest weights and 1 GiB."""
    largest = 2 * max(out * inner for out, inner in SHAPES.values()) / 2**20
    whole = not found["finished_before"]
    return {
        "window": args.window,
        "rank": args.rank,
        "layers": args.layers,
        "matrices": found["layers"],
        "finished_before": found["finished_before"],
        "seconds": f"{found['seconds']:.1f}",
        "layer_s": f"{found['seconds'] / args.layers:.1f}" if whole else "",
        "svd_s": f"{found['svd_seconds']:.1f}",
        "cpu_s": f"{found['cpu_s']:.1f}",
        "peak_mib": f"{found['peak_mib']:.0f}",
        "largest_mib": f"{largest:.0f}",
        "limit_mib": f"{4 * largest + 1024:.0f}",
        "speedup": f"{alone['seconds'] / found['seconds']:.2f}" if whole else "",
        "cpu_speedup": f"{alone['cpu_s'] / found['cpu_s']:.2f}" if whole else "",
        **facts(torch.device("cpu")),
    }


if __name__ == "__main__":
    sys.exit(main())
