"""What vLLM computes: ``python in_vllm.py FOLDER OUT``; each adapter is a LoRARequest on one engine."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that refusals arrive here
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def installed() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    raise SystemExit("vLLM is not installed")


def main(folder: Path, out: Path) -> None:
    os.environ.update(SETTINGS)
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    cases = json.loads((folder / "cases.json").read_text())
    adapters = {name: folder / "serve" / str(number) for number, name in enumerate(cases["names"])}
    rank = max(json.loads((path / "adapter_config.json").read_text())["r"] for path in adapters.values())
    allowed = next(limit for limit in (8, 16, 32, 64, 128, 256, 320, 512) if limit >= rank)
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "seed": 0}
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": allowed}
    rest = {"skip_tokenizer_init": True, "max_logprobs": -1, "enable_prefix_caching": False}
    llm = LLM(str(folder / "base"), **engine, **lora, **rest)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    found = {"version": np.array(installed())}
    for number, name in enumerate(["base", *cases["names"]]):
        request = LoRARequest(name, number, str(adapters[name])) if name != "base" else None
        if request:  # a refusal inside generate leaves its request behind, and the next call waits for ever
            llm.llm_engine.add_lora(request)
        said = llm.generate({"prompt_token_ids": cases["ids"]}, asked, lora_request=request, use_tqdm=False)[0]
        rows = [[place[word].logprob for word in range(len(place))] for place in said.prompt_logprobs[1:]]
        found[name] = np.array([*rows, [np.nan] * len(rows[0])])  # of the last position it tells nothing
    np.savez(out, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
