"""The pages' programs run as printed, page by page, in a folder that holds a small model; their commands exist."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import ipca
from ipca.cli.arguments import parser
from tests.helpers.markdown import blocks, programs

for needed in ("transformers", "peft", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PROGRAMS = {page: found for page, text in TEXTS.items() if (found := programs(text))}
TEXT = {"german.txt": "Ein Satz, der gelernt wird.\n\n" * 40, "english.txt": "A sentence to keep.\n\n" * 40}
NOT_RUN = {("training.md", "needs DeepSpeed")}
NEEDS = {"quantized.md": "bitsandbytes", "forgetting.md": "trl", "train.md": "trl", "training.md": "trl"}
TRAINED = [pytest.param(page, marks=pytest.mark.slow) for page in PROGRAMS if NEEDS.get(page) == "trl"]
COMMANDS = sorted(
    {
        line
        for text in TEXTS.values()
        for block in blocks(text, "sh")
        for line in block.splitlines()
        if " ipca " in f" {line}"
    }
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What pages take for granted: path/to/model, a trained adapter of it in path/to/adapter, and two texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("made") / "path" / "to"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=257, num_key_value_heads=2))
    model.save_pretrained(folder / "model")
    runpy.run_path(str(ROOT / "examples" / "tiny.py"))["tiny_tokenizer"]().save_pretrained(folder / "model")
    ipca.apply_pc(model, rank=16, progress=False)
    with torch.no_grad():
        for factor in ipca.adapter_parameters(model):
            factor.add_(0.01 * torch.randn_like(factor))
    ipca.save_adapter(model, folder / "adapter")
    for name, text in TEXT.items():
        (folder.parents[1] / name).write_text(text)
    return folder.parents[1]


@pytest.fixture
def workplace(made, tmp_path, monkeypatch):
    """The current folder, home folder and process group of one page."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", **group}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    ipca.set_backend("auto")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [*TRAINED, *(page for page in PROGRAMS if NEEDS.get(page) != "trl")])
def test_the_programs_of_a_page_run_as_printed(page, workplace):
    pytest.importorskip(NEEDS.get(page, "torch"))
    if page == "large-models.md":
        (command,) = re.findall(r"ipca (init .* -o adapter)$", TEXTS[page].split("```python")[0], flags=re.MULTILINE)
        from ipca.cli.main import main

        assert main([*command.split(), "--quiet"]) == 0
    names = {"__name__": "page"}
    for number, (program, reason) in enumerate(PROGRAMS[page], 1):
        if not reason:
            exec(compile(program, f"{page}, program {number}", "exec"), names)


def test_only_these_programs_do_not_run():
    assert {(page, reason) for page, found in PROGRAMS.items() for _, reason in found if reason} == NOT_RUN
    assert sum(map(len, PROGRAMS.values())) > 30


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists(line):
    words = shlex.split(line.partition("|")[0].partition("&&")[0].partition(">")[0], comments=True)
    try:
        parser().parse_args(words[words.index("ipca") + 1 :])
    except SystemExit as end:
        if end.code:  # 0 for an option that prints something and does nothing else
            raise
