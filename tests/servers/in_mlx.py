"""What mlx-lm computes: ``python in_mlx.py FOLDER OUT``; the environment has mlx-lm, and mlx[cpu] on Linux."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def main(folder: Path, out: Path) -> None:
    mx.set_default_device(mx.cpu)
    cases = json.loads((folder / "cases.json").read_text())
    found = {"version": np.array(version("mlx-lm"))}
    for number, name in enumerate(["base", *cases["names"]], -1):
        adapter = folder / "mlx" / str(number)
        if name == "base" or adapter.is_dir():
            model = load_model(folder / "base")[0]
            model = model if name == "base" else load_adapters(model, str(adapter))
            logits = np.array(model(mx.array([cases["ids"]]))[0].astype(mx.float32), dtype=np.float64)
            top = logits.max(-1, keepdims=True)
            found[name] = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    np.savez(out, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
