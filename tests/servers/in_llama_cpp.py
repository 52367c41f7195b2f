"""What llama.cpp computes: ``python in_llama_cpp.py FOLDER OUT``, after ``… FOLDER --convert SOURCE``.

``SOURCE`` is llama.cpp's source, whose converters need torch and transformers; the library needs llama-cpp-python.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def convert(folder: Path, source: Path) -> None:
    """GGUF files of base and adapters by llama.cpp's own converters, in float32."""
    made = folder / "gguf"
    made.mkdir(exist_ok=True)
    names = json.loads((folder / "cases.json").read_text())["names"]
    run(source / "convert_hf_to_gguf.py", folder / "base", "--outfile", made / "base.gguf")
    for number in range(len(names)):
        adapter = folder / "serve" / str(number)
        run(
            source / "convert_lora_to_gguf.py", adapter, "--base", folder / "base", "--outfile", made / f"{number}.gguf"
        )


def run(script: Path, *words: object) -> None:
    command = [sys.executable, str(script), *map(str, words), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script.name}: {done.stderr[-3000:]}")


def compute(folder: Path, out: Path) -> None:
    """Log-probabilities in float32, with a cache in float32 and without flash attention."""
    import llama_cpp
    import numpy as np

    cases = json.loads((folder / "cases.json").read_text())
    single = llama_cpp.GGML_TYPE_F32
    options = {"n_ctx": 128, "n_batch": 128, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
    exact = {"flash_attn": False, "type_k": single, "type_v": single, "verbose": False}
    found = {"version": np.array(version("llama-cpp-python"))}
    for number, name in enumerate(["base", *cases["names"]], -1):
        adapter = None if name == "base" else str(folder / "gguf" / f"{number}.gguf")
        model = llama_cpp.Llama(str(folder / "gguf" / "base.gguf"), lora_path=adapter, **options, **exact)
        model.eval(cases["ids"])
        logits = np.array(model.scores[: len(cases["ids"])], dtype=np.float64)
        top = logits.max(-1, keepdims=True)
        found[name] = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    np.savez(out, **found)


if __name__ == "__main__":
    if sys.argv[2] == "--convert":
        convert(Path(sys.argv[1]), Path(sys.argv[3]))
    else:
        compute(Path(sys.argv[1]), Path(sys.argv[2]))
