"""Every error of a command speaks of the command line: no Python call, keyword or argument.

Errors of a sweep's task file may: it is written in Python.
"""

import inspect
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BitsAndBytesConfig, GPT2LMHeadModel, LlamaForCausalLM

import ipca
from ipca.analysis import spectrum
from ipca.cli.main import main
from ipca.svd.cache import SpectralCache, cached_window_svd
from tests.helpers.layer_kinds import STACKS, mixtral
from tests.helpers.model_folders import gpt2_config, save_llama, spoil

WEIGHTS, CONFIG, SIDECAR = "adapter_model.safetensors", "adapter_config.json", "ipca.json"
FUNCTIONS = [function for name in ipca.__all__ if inspect.isfunction(function := getattr(ipca, name))]
NAMES = {name for function in (*FUNCTIONS, spectrum) for name in inspect.signature(function).parameters if "_" in name}
PEFT_FIELDS = {"modules_to_save", "lora_alpha", "lora_dropout", "target_modules"}
PYTHON = re.compile(r"\bipca\.(?!json\b)\w+|\b\w+=(True|False|None|'|\"|\[)|\b[\w.]+\((?!s\))|`")


def bert(seed: int = 0, width: int = 32) -> BertModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, vocab_size=50))


def lora(model, folder, **options) -> None:
    get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["query"], **options})).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models and adapters, by name, in one folder that no test changes."""
    top = tmp_path_factory.mktemp("folders")
    bert().save_pretrained(top / "model")
    bert(1).save_pretrained(top / "another")
    bert(width=16).save_pretrained(top / "narrow")
    GPT2LMHeadModel(gpt2_config()).save_pretrained(top / "tied")
    experts = mixtral()
    experts.save_pretrained(top / "experts")
    ipca.save_adapter(ipca.apply_pc(bert(), rank=4, targets=["query"], progress=False), top / "adapter")
    saved = ipca.apply_pc(bert(), rank=4, targets=["query"], modules_to_save=["pooler"], progress=False)
    ipca.save_adapter(saved, top / "with a pooler")
    ipca.save_adapter(ipca.apply_pc(experts, rank=2, targets=STACKS, progress=False), top / "of experts")
    lora(bert(), top / "lora")
    lora(bert(), top / "dora", use_dora=True)
    lora(bert(), top / "pissa", init_lora_weights="pissa")
    lora(bert(), top / "niter", init_lora_weights="pissa_niter_4")
    lora(bert(), top / "olora", init_lora_weights="olora")
    lora(bert(), top / "odd", r=3)
    lora(BertModel.from_pretrained(top / "model"), top / "beside", target_modules=["query"])
    shutil.copytree(top / "model", top / "beside", dirs_exist_ok=True)
    return top


@pytest.fixture
def said(capsys):
    """A function that runs a command, checks the words of its error, and returns them."""

    def run(status: int, *words: object) -> str:
        line = [str(word) for word in words]
        capsys.readouterr()
        try:
            found = main(line)
        except SystemExit as stop:
            found = stop.code
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert found == status, error
        ours = error.partition("transformers cannot load")[0].replace("base_model.model.", "")  # a key of PEFT's file
        assert PYTHON.search(ours) is None, error
        names = NAMES - PEFT_FIELDS if "convert" in line else NAMES
        assert not names.intersection(re.findall(r"\w+", ours)), error
        return error

    return run


USAGE = {
    "no command": ((), "required: COMMAND"),
    "unknown command": (("nonsense",), "invalid choice: 'nonsense'"),
    "no out": (("init", "model"), "required: -o/--out"),
    "rank": (("init", "model", "--rank", "0", "-o", "out"), "--rank"),
    "rank of inspect": (("inspect", "model", "--rank", "1.5"), "--rank"),
    "window": (("init", "model", "--window", "midle", "-o", "out"), "--window"),
    "whole number": (("init", "model", "--window", "1", "-o", "out"), "'start=1' for the index, '1.0'"),
    "window auto": (("init", "model", "--window", "auto", "-o", "out"), "--window"),
    "negative start": (("init", "model", "--window", "start=-1", "-o", "out"), "--window"),
    "fraction": (("init", "model", "--window", "256.0", "-o", "out"), "write 'start=256'"),
    "alpha": (("init", "model", "--alpha", "-1", "-o", "out"), "--alpha"),
    "tol": (("init", "model", "--tol", "quick", "-o", "out"), "--tol"),
    "form": (("init", "model", "--form", "truncated", "-o", "out"), "--form"),
    "device": (("init", "model", "--device", "tpu", "-o", "out"), "--device"),
    "two caches": (("init", "model", "--cache", "x", "--no-cache", "-o", "out"), "--no-cache"),
    "plot": (("inspect", "model", "--plot", "x.gif"), "--plot: x.gif must end in .png, .pdf or .svg"),
    "format": (("export", "model", "adapter", "--format", "onnx", "-o", "out"), "--format"),
    "no rank": (("export", "model", "adapter", "--format", "truncated", "-o", "out"), "needs --rank"),
    "rank of none": (("export", "model", "adapter", "--rank", "3", "-o", "out"), "--rank is only for"),
    "shell": (("completion", "fish"), "invalid choice: 'fish'"),
    "action's option": (("cache", "list", "--all"), "ipca cache list: error: there is no option --all"),
    "abbreviated": (("init", "model", "--win", "1", "-o", "out"), "argument --window: "),
    "prune": (("cache", "prune"), "--max-bytes, --older-than, or both"),
    "size": (("cache", "prune", "--max-bytes", "ten"), "--max-bytes"),
    "age": (("cache", "prune", "--older-than", "30"), "--older-than"),
    "lrs": (("sweep", "task.py", "--lrs", "-1", "-o", "out"), "--lrs"),
    "windows": (("sweep", "task.py", "--windows", "0", "0.5", "-o", "out"), "--windows"),
    "seeds": (("sweep", "task.py", "--seeds", "0", "-o", "out"), "--seeds"),
    "methods": (("sweep", "task.py", "--methods", "pissa", "-o", "out"), "--methods"),
    "a window twice": (("sweep", "task.py", "--windows", "0.5", "0.50", "-o", "out"), "--windows has 0.5 twice"),
    "a rate twice": (("sweep", "task.py", "--lrs", "1e-3", "0.001", "-o", "out"), "--lrs has 0.001 twice"),
    "a method twice": (("sweep", "task.py", "--methods", "lora", "lora", "-o", "out"), "--methods has lora twice"),
    "devices": (("sweep", "task.py", "--devices", "GPU 1", "-o", "out"), "--devices: must be a device such as cpu"),
    "rank of serve": (
        ("export", "model", "adapter", "--format", "serve", "--rank", "3", "-o", "out"),
        "--rank is only",
    ),
    "comparisons": (("sweep", "task.py", "--comparisons", "update", "-o", "out"), "--comparisons"),
    "steps": (("demo", "--steps", "0"), "--steps"),
}


@pytest.mark.parametrize(("words", "says"), USAGE.values(), ids=USAGE)
def test_wrong_usage(said, words, says):
    assert says in said(2, *words)


INPUTS = {
    "no model": (("init", "{}/none", "-o", "{out}"), "holds no config.json; give a Hugging Face model folder"),
    "no model to inspect": (("inspect", "{}/none"), "holds no config.json"),
    "no adapter": (("merge", "{}/model", "{}/none", "-o", "{out}"), "is not a folder; give the folder of an adapter"),
    "a model as adapter": (("merge", "{}/model", "{}/model", "-o", "{out}"), f"has no {WEIGHTS}"),
    "another base": (("merge", "{}/another", "{}/adapter", "-o", "{out}"), "or pass --any-base if"),
    "another base for export": (("export", "{}/another", "{}/adapter", "-o", "{out}"), "or pass --any-base if"),
    "another shape": (("merge", "{}/narrow", "{}/adapter", "-o", "{out}"), "but the adapter was made for (32, 32)"),
    "another model": (("merge", "{}/tied", "{}/adapter", "-o", "{out}"), "does not have"),
    "another head": (("merge", "{}/narrow", "{}/with a pooler", "-o", "{out}"), "pooler: the adapter holds"),
    "a stock LoRA to merge": (("merge", "{}/model", "{}/lora", "-o", "{out}"), "use ipca convert"),
    "a stock LoRA to export": (("export", "{}/model", "{}/lora", "-o", "{out}"), "use ipca convert"),
    "rank too large": (("init", "{}/model", "--rank", "33", "-o", "{out}"), "there are only 32; lower the rank"),
    "rank to inspect": (("inspect", "{}/model", "--rank", "33"), "there are only 32; lower the rank"),
    "window beyond": (("init", "{}/model", "--window", "start=30", "-o", "{out}"), "lower its start or rank"),
    "target": (("init", "{}/model", "--targets", "nowhere", "-o", "{out}"), "no module matches the target 'nowhere'"),
    "misspelled": (("init", "{}/model", "--targets", "qury", "-o", "{out}"), "Did you mean 'query'"),
    "commas": (
        ("init", "{}/model", "--targets", "query,key", "-o", "{out}"),
        "give 'query' and 'key' as separate ones",
    ),
    "misspelled to inspect": (("inspect", "{}/model", "--targets", "qury"), "Did you mean 'query'"),
    "misspelled exclude": (("init", "{}/model", "--exclude", "qury", "-o", "{out}"), "Did you mean 'query'"),
    "a file as cache": (
        ("init", "{}/model", "--cache", "{}/model/config.json", "-o", "{out}"),
        "config.json is not a folder; give the folder of a cache to --cache",
    ),
    "serve a whole module": (
        ("export", "{}/model", "{}/with a pooler", "--format", "serve", "-o", "{out}"),
        "pooler: trained whole, and servers read only LoRA factors from an adapter",
    ),
    "mlx without such layers": (
        ("export", "{}/model", "{}/adapter", "--format", "mlx", "-o", "{out}"),
        "mlx-lm adapts linear layers called model.layers.NUMBER",
    ),
    "exclude": (("init", "{}/model", "--exclude", "nowhere", "-o", "{out}"), "exclude 'nowhere' matches no module"),
    "pattern": (("init", "{}/model", "--targets", "(", "-o", "{out}"), "neither a module name nor a regular"),
    "no layer": (("init", "{}/model", "--targets", "LayerNorm", "-o", "{out}"), "it is a LayerNorm, not an nn.Linear"),
    "all excluded": (
        ("init", "{}/model", "--exclude", "dense", "query", "key", "value", "-o", "{out}"),
        "no linear layer",
    ),
    "tied": (("init", "{}/tied", "--targets", "lm_head", "-o", "{out}"), "its weight is tied to another module's"),
    "experts": (("init", "{}/experts", "--targets", "mlp.experts", "-o", "{out}"), "name its stacks of weights"),
    "spectra of experts": (
        ("init", "{}/experts", "--targets", *STACKS, "--window", "erank", "--rank", "2", "-o", "{out}"),
        "name an index or a fraction",
    ),
    "tiny alpha": (("init", "{}/model", "--alpha", "1e-300", "-o", "{out}"), "the factors overflow"),
    "huge alpha": (("init", "{}/model", "--alpha", "1e300", "-o", "{out}"), "lower alpha"),
    "a PEFT adapter beside": (("init", "{}/beside", "-o", "{out}"), "it belongs to a PEFT adapter"),
    "experts truncated": (
        ("export", "{}/experts", "{}/of experts", "--format", "truncated", "--rank", "2", "-o", "{out}"),
        "use the format 'peft'",
    ),
    "out is the model": (("export", "{}/model", "{}/adapter", "-o", "{}/model"), "is the model itself"),
    "out is the adapter": (("convert", "{}/model", "{}/adapter", "-o", "{}/adapter"), "is the adapter itself"),
    "out is full": (("merge", "{}/model", "{}/adapter", "-o", "{}"), "is not empty; choose a new folder"),
    "residual into a full folder": (
        ("export", "{}/model", "{}/adapter", "--format", "residual", "-o", "{}"),
        "is not empty; choose a new folder",
    ),
    "init into a full folder": (("init", "{}/model", "--form", "residual", "-o", "{}"), "is not empty"),
    "out below a file": (("init", "{}/model", "-o", "{}/model/config.json/x"), "is not a folder"),
    "plot below a file": (("inspect", "{}/model", "--plot", "{}/model/config.json/x.png"), "is not a folder"),
    "options of an adapter": (("inspect", "{}/adapter", "--rank", "4"), "are chosen; leave out --rank"),
    "plain LoRA": (("convert", "{}/model", "{}/lora", "-o", "{out}"), "this is no LoRA of twice a window's rank"),
    "odd rank": (("convert", "{}/model", "{}/odd", "-o", "{out}"), "its rank 3 is odd"),
    "DoRA": (("convert", "{}/model", "{}/dora", "-o", "{out}"), "use_dora is True, so this is no plain LoRA"),
    "OLoRA": (("convert", "{}/model", "{}/olora", "-o", "{out}"), "which is no window of singular components"),
    "PiSSA's approximation": (
        ("convert", "{}/model", "{}/niter", "-o", "{out}"),
        "Give the residual base as the model",
    ),
    "PiSSA's other base": (
        ("convert", "{}/model", "{}/pissa", "--original", "{}/another", "-o", "{out}"),
        "is not the principal window of rank 4",
    ),
    "PiSSA's wrong original": (
        ("convert", "{}/model", "{}/pissa", "--original", "{}/tied", "-o", "{out}"),
        "the original has no encoder.layer.0.attention.self.query",
    ),
    "LoRA of another shape": (("convert", "{}/narrow", "{}/lora", "-o", "{out}"), "but the adapter was made for"),
    "no LoRA": (("convert", "{}/model", "{}/none", "-o", "{out}"), "is not a folder; give the folder of a PEFT"),
    "a model as LoRA": (("convert", "{}/model", "{}/model", "-o", "{out}"), f"has no {CONFIG}"),
    "no cache": (("cache", "list", "--cache", "{}/model/config.json"), "is not a folder; give the folder of a cache"),
    "no text": (("demo", "--text", "{}/none.tar.gz", "-o", "{out}"), "pip download"),
}


@pytest.mark.parametrize(("words", "says"), INPUTS.values(), ids=INPUTS)
def test_wrong_input(said, folders, tmp_path, words, says):
    assert says in said(1, *(word.format(folders, out=tmp_path / "out") for word in words))
    assert not (tmp_path / "out").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def nan(path):
    tensors = load_file(path)
    key = min(key for key in tensors if "lora_A" in key or "query.weight" in key)
    tensors[key][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


DAMAGE = {
    "weights cut": ("adapter", lambda f: cut(f / WEIGHTS), "is damaged or truncated"),
    "record cut": ("adapter", lambda f: cut(f / SIDECAR), f"{SIDECAR} is damaged"),
    "record empty": ("adapter", lambda f: (f / SIDECAR).write_text("{}"), f"{SIDECAR} is damaged: KeyError: 'format'"),
    "newer": ("adapter", lambda f: change(f / SIDECAR, format=2), "that of a newer ipca; upgrade it"),
    "fields": ("adapter", lambda f: change(f / SIDECAR, layers={"a": {}}), f"{SIDECAR} is damaged: KeyError"),
    "weights gone": ("adapter", lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}: it is no adapter folder"),
    "weights changed": ("adapter", lambda f: nan(f / WEIGHTS), "is not the file that ipca.json was written with"),
    "config cut": ("model", lambda f: cut(f / "config.json"), "transformers cannot load"),
    "config of an unknown model": ("model", lambda f: change(f / "config.json", model_type="none"), "cannot load"),
    "model cut": ("model", lambda f: cut(f / "model.safetensors"), ""),
    "model gone": ("model", lambda f: (f / "model.safetensors").unlink(), "transformers cannot load"),
    "model with its own code": (
        "model",
        lambda f: change(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"}),
        "code of its own, which is not run here; load it in Python",
    ),
}


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize(("which", "damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(said, folders, tmp_path, which, damage, says, command):
    for name in ("model", "adapter"):
        shutil.copytree(folders / name, tmp_path / name)
    damage(tmp_path / which)
    assert says in said(1, command, tmp_path / "model", tmp_path / "adapter", "-o", tmp_path / "out")


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_damaged_lora(said, folders, tmp_path, command):
    def fails(damage) -> str:
        shutil.rmtree(tmp_path / "lora", ignore_errors=True)
        shutil.copytree(folders / "lora", tmp_path / "lora")
        damage(tmp_path / "lora")
        convert = ("convert", folders / "model", tmp_path / "lora", "-o", tmp_path / "out")
        return said(1, *(convert if command == "convert" else ("inspect", tmp_path / "lora")))

    def pickled(folder):
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")

    assert "is damaged or truncated" in fails(lambda folder: cut(folder / WEIGHTS))
    assert "holds NaN or Inf" in fails(lambda folder: nan(folder / WEIGHTS))
    assert f"{CONFIG} is damaged" in fails(lambda folder: change(folder / CONFIG, r="4"))
    assert "peft_type is 'LOHA'" in fails(lambda folder: change(folder / CONFIG, peft_type="LOHA"))
    assert "a pickle, which can run code when it is read" in fails(pickled)


def test_damaged_models_for_init(said, tmp_path):
    folder = save_llama(tmp_path / "llama")
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    index.write_text("{}")
    assert "index.json is damaged" in said(1, "init", folder, "-o", tmp_path / "out")
    index.write_text(whole)
    shards[0].rename(tmp_path / "shard")
    assert "which is not there; download it again" in said(1, "init", folder, "-o", tmp_path / "out")
    shutil.copy(tmp_path / "shard", shards[0])
    cut(shards[0])
    assert "is damaged or truncated" in said(1, "init", folder, "-o", tmp_path / "out")
    shutil.copy(tmp_path / "shard", shards[0])
    spoil(folder)
    assert "the tensor holds NaN or Inf" in said(1, "init", folder, "--rank", "4", "-o", tmp_path / "out")
    error = said(1, "init", folder, "--rank", "4", "--alpha", "8", "-o", tmp_path / "out")
    assert "holds the finished layers of a different run (alpha null, now 8.0); repeat that one" in error


def test_a_trained_adapter_is_not_replaced(said, folders, tmp_path):
    model = ipca.load_adapter(bert(), folders / "adapter")
    with torch.no_grad():
        next(ipca.adapter_parameters(model)).add_(1.0)
    ipca.save_adapter(model, tmp_path / "trained")
    error = said(1, "init", folders / "model", "-o", tmp_path / "trained")
    assert "holds an adapter that is trained or not readable; choose another folder" in error


def test_quantized_models(said, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_llama(tmp_path / "llama")
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    ipca.save_adapter(ipca.apply_pc(model, rank=4, progress=False), tmp_path / "adapter")
    error = said(1, "init", tmp_path / "quantized", "--rank", "4", "--form", "residual", "-o", tmp_path / "out")
    assert "its weight is quantized" in error
    assert "use the intact form" in error
    words = ("export", tmp_path / "quantized", tmp_path / "adapter", "--format", "residual", "-o", tmp_path / "out")
    assert "is quantized (int8), and W_res would have to be quantized again" in said(1, *words)


def test_a_damaged_cache(said, tmp_path):
    cache = SpectralCache(tmp_path / "cache")
    cached_window_svd(torch.randn(12, 8), ipca.Window.middle(2), cache=cache)
    cut(cache.entries()[0].path)
    error = said(1, "cache", "verify", "--cache", cache.folder)
    assert "1 entries are damaged" in error
    assert "ipca cache verify --remove deletes them" in error


def test_what_this_machine_lacks(said, folders, tmp_path, monkeypatch):
    words = ("init", folders / "model", "-o", tmp_path / "out")
    if not torch.cuda.is_available():
        assert "--device cuda, but this torch sees no GPU; leave it out" in said(1, *words, "--device", "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert "RANK is not set; start the processes with torchrun" in said(1, *words)
