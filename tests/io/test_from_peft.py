"""import_peft: adapters that stock PEFT has trained and saved, loaded as our layers."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ipca
from ipca import Window
from ipca.io.peft_lora import read_stock
from tests.helpers.models import Net, adapted, snapshot

TARGETS = ["a", "b"]
X = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))


class Run(Net):
    def forward(self, x):
        return self.norm(self.b(self.a(x).relu()))


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


class Pissa:
    """An adapter that PEFT trained from a PiSSA start, in every way that PEFT and its users save one."""

    def __init__(self, base: nn.Module, root: Path, init: str = "pissa", x: torch.Tensor = X, **options) -> None:
        config = LoraConfig(init_lora_weights=init, **{"r": 3, "target_modules": TARGETS, **options})
        model = get_peft_model(copy.deepcopy(base), config)
        saved = model.peft_config["default"]
        saved.init_lora_weights = True
        model.save_pretrained(root / "start")
        saved.init_lora_weights = init
        self.residual = copy.deepcopy(model).unload()
        train(model)
        model.save_pretrained(root / "trained")
        model.save_pretrained(root / "converted", path_initial_model_for_weight_conversion=str(root / "start"))
        with torch.no_grad():
            self.y = logits(model, x)


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model.eval()(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def off(model: nn.Module, y: torch.Tensor, x: torch.Tensor = X) -> float:
    with torch.no_grad():
        return ((logits(model, x) - y).norm() / y.norm()).item()


OPTIONS = {
    "plain": {},
    "alpha": {"lora_alpha": 7},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
}
PATTERNS = {"rank_pattern": {"b": 5}, "alpha_pattern": {r"a": 4.5}, "lora_alpha": 7}


@pytest.mark.parametrize("options", [*OPTIONS.values(), PATTERNS], ids=[*OPTIONS, "patterns"])
def test_a_pissa_adapter_that_peft_converted(options, tmp_path):
    base = Run()
    pissa = Pissa(base, tmp_path, **options)
    model = ipca.import_peft(copy.deepcopy(base), tmp_path / "converted", progress=False)
    assert off(model, pissa.y) < 1e-6
    assert off(base, pissa.y) > 1e-2
    assert (model.a.window, model.b.window) == (Window(0, 3), Window(0, 5 if options is PATTERNS else 3))
    assert model.a.form == "intact"
    assert torch.equal(model.a.base_weight, base.a.weight)
    assert model.a.svd_report.certified
    assert "; the factors are within " in model.a.svd_report.certificate
    with ipca.disabled(model), torch.no_grad():
        assert torch.equal(model(X), base(X))


@pytest.mark.parametrize("options", [*OPTIONS.values(), PATTERNS], ids=[*OPTIONS, "patterns"])
def test_a_pissa_adapter_on_its_residual_base(options, tmp_path):
    base = Run()
    pissa = Pissa(base, tmp_path, **options)
    model = ipca.import_peft(copy.deepcopy(pissa.residual), tmp_path / "trained", original=base, progress=False)
    assert off(model, pissa.y) < 1e-6
    assert model.a.form == "residual"
    assert torch.equal(model.a.base_weight, pissa.residual.a.weight)
    assert model.a.certificate.relative <= 2**-23
    ipca.save_adapter(model, tmp_path / "ours")
    again = ipca.load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert off(again, pissa.y) < 1e-6
    assert off(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"), pissa.y) < 1e-6


def test_a_pissa_adapter_on_the_original_base_as_peft_itself_loads_it(tmp_path):
    base = Run()
    pissa = Pissa(base, tmp_path, lora_alpha=7)
    model = ipca.import_peft(copy.deepcopy(base), tmp_path / "trained", progress=False)
    assert off(model, pissa.y) < 1e-5
    assert off(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "trained"), pissa.y) < 1e-5


@pytest.mark.parametrize("way", ["converted", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype, way, tmp_path):
    base = Run().to(dtype)
    pissa = Pissa(base, tmp_path, x=X.to(dtype))
    model = copy.deepcopy(pissa.residual if way == "trained" else base)
    original = base if way == "trained" else None
    model = ipca.import_peft(model, tmp_path / way, original=original, progress=False)
    assert off(model, pissa.y, X.to(dtype)) < 2 * torch.finfo(dtype).eps
    assert model.a.lora_A.dtype == torch.float32
    assert model.a.svd_report.residual < torch.finfo(dtype).eps


@pytest.mark.parametrize("window", ["principal", "middle", "minor", "start=1"])
@pytest.mark.parametrize("rank", [1, 3])
def test_our_own_adapter_without_its_sidecar(window, rank, tmp_path):
    base = Run()
    model = ipca.apply_pc(copy.deepcopy(base), rank=rank, window=window, alpha=5.0, modules_to_save=["norm"])
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    ipca.export(model, tmp_path)
    back = ipca.import_peft(copy.deepcopy(base), tmp_path)
    assert off(back, model(X).detach()) < 1e-6
    for name in TARGETS:
        mine, theirs = back.get_submodule(name), model.get_submodule(name)
        assert (mine.window, mine.alpha, mine.rank) == (theirs.window, theirs.alpha, theirs.rank)
        assert all(
            torch.equal(getattr(mine, f), getattr(theirs, f)) for f in ("lora_A", "lora_B", "lora_A0", "lora_B0")
        )
        assert mine.base_sha256 == theirs.base_sha256
    trainable = {name for name, parameter in back.named_parameters() if parameter.requires_grad}
    assert trainable == {"a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B", "norm.weight", "norm.bias"}


class Head(Run):
    """With a layer of a name at which PEFT saves the base weight, too."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(self.b.out_features, 9, bias=False)

    def forward(self, x):
        return self.lm_head(super().forward(x))

    def get_output_embeddings(self):
        return self.lm_head

    get_input_embeddings = get_output_embeddings  # PEFT asks for both


def save(model: nn.Module, out: Path) -> None:
    model.save_pretrained(out, save_embedding_layers=True)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_with_the_base_weight_of_a_head(dtype, tmp_path):
    base = Head().to(dtype)
    model = ipca.apply_pc(copy.deepcopy(base), rank=2, targets=["a", "lm_head"], progress=False)
    train(model)
    ipca.export(model, tmp_path / "ours")
    save(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"), tmp_path / "again")
    assert set(read_stock(tmp_path / "again").layers) == {"a", "lm_head"}
    for there in (dtype, torch.float32):
        back = ipca.import_peft(copy.deepcopy(base).to(there), tmp_path / "again", progress=False)
        assert torch.equal(back.lm_head.lora_A, model.lm_head.lora_A)
        assert back.lm_head.window == model.lm_head.window
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    refuses(other, tmp_path / "again", "the adapter holds the base weight of lm_head, and this model has another")


@pytest.mark.parametrize("load", [ipca.load_adapter, ipca.import_peft])
@pytest.mark.parametrize(
    ("wrap", "inside"), [(torch.compile, "_orig_mod"), (nn.DataParallel, "module"), (AveragedModel, "module")]
)
def test_a_wrapper_is_named_with_the_model_inside(load, wrap, inside, tmp_path):
    base = Run()
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), rank=2, targets=TARGETS, progress=False), tmp_path)
    model = wrap(base)
    with pytest.raises(ValueError, match=rf"the model is inside a \w+; load the adapter onto model\.{inside}\."):
        load(model, tmp_path)


@pytest.mark.parametrize("load", [ipca.load_adapter, ipca.import_peft])
def test_a_module_that_is_rounded_is_named(load, tmp_path):
    model = ipca.apply_pc(Run(), rank=2, targets=TARGETS, modules_to_save=["norm"], progress=False)
    (ipca.save_adapter if load is ipca.load_adapter else ipca.export)(model, tmp_path)
    options = {"check_base": False} if load is ipca.load_adapter else {"progress": False}
    other = ipca.unload(model).bfloat16()
    with pytest.warns(RuntimeWarning, match="of a LayerNorm in float32, and this model rounds it to bfloat16"):
        load(copy.deepcopy(other), tmp_path, **options)
    other.norm.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        load(other, tmp_path, **options)


def test_a_pissa_adapter_with_the_base_weight_of_a_head(tmp_path):
    base = Head()
    config = LoraConfig(init_lora_weights="pissa", r=2, target_modules=["a", "lm_head"])
    model = get_peft_model(copy.deepcopy(base), config)
    residual = copy.deepcopy(model).unload()
    train(model)
    save(model, tmp_path)
    y = logits(model, X).detach()
    assert off(ipca.import_peft(copy.deepcopy(residual), tmp_path, original=base, progress=False), y) < 1e-6
    assert off(ipca.import_peft(copy.deepcopy(base), tmp_path, progress=False), y) < 1e-5


def test_a_transformers_model_with_conv1d_layers(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    ids = torch.arange(6)[None]
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    pissa = Pissa(base, tmp_path, x=ids, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = ipca.import_peft(copy.deepcopy(base), tmp_path / "converted", progress=False)
    assert off(model, pissa.y, ids) < 1e-5
    model = ipca.import_peft(copy.deepcopy(pissa.residual), tmp_path / "trained", original=base, progress=False)
    assert off(model, pissa.y, ids) < 1e-5


def test_dropout_is_that_of_the_configuration(tmp_path):
    base = Run()
    Pissa(base, tmp_path, lora_dropout=0.25)
    assert ipca.import_peft(base, tmp_path / "converted", progress=False).a.dropout == 0.25


def test_the_bar_can_be_left_out(tmp_path, capfd):
    base = Run()
    Pissa(base, tmp_path)
    capfd.readouterr()
    ipca.import_peft(copy.deepcopy(base), tmp_path / "converted", progress=False)
    assert capfd.readouterr().err == ""
    ipca.import_peft(base, tmp_path / "converted")
    assert "Windows" in capfd.readouterr().err


def refuses(model: nn.Module, folder: Path, words: str, original: nn.Module | None = None) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        ipca.import_peft(model, folder, original=original, progress=False)
    assert snapshot(model) == before


def test_a_lora_from_a_start_of_zero(tmp_path):
    base = Run()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=TARGETS))
    model.save_pretrained(tmp_path / "new")
    train(model)
    model.save_pretrained(tmp_path / "even")
    for name in ("new", "even"):
        refuses(base, tmp_path / name, r"a: this is no LoRA of twice a window's rank .* away from the nearest window")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=TARGETS))
    model.save_pretrained(tmp_path / "odd")
    refuses(base, tmp_path / "odd", r"its rank 3 is odd\). A plain LoRA starts from 0 .* use it with PEFT")


def test_an_approximate_pissa_start_is_refused_by_what_it_is_off(tmp_path):
    base = Run()
    pissa = Pissa(base, tmp_path, init="pissa_niter_1")
    refuses(base, tmp_path / "converted", "away from the nearest window")
    refuses(base, tmp_path / "trained", "init_lora_weights is 'pissa_niter_1': PEFT then starts from a random approxi")
    refuses(pissa.residual, tmp_path / "trained", "is not the principal window of rank 3", original=base)


def test_another_base_is_refused(tmp_path):
    base, other = Run(), Run()
    pissa = Pissa(base, tmp_path)
    refuses(other, tmp_path / "converted", "away from the nearest window")
    refuses(pissa.residual, tmp_path / "trained", "of the weight is neither", original=other)
    refuses(base, tmp_path / "trained", "is not the principal window of rank 3", original=pissa.residual)
    refuses(base, tmp_path / "trained", "is not the principal window of rank 3", original=base)


def test_a_residual_base_that_somebody_changed(tmp_path):
    base = Run()
    pissa = Pissa(base, tmp_path)
    with torch.no_grad():
        pissa.residual.a.weight[3, 4] += 1e-4
    refuses(pissa.residual, tmp_path / "trained", r"a: .* and \d\.\de-05 of the weight is neither", original=base)


def test_an_original_without_the_layer_or_of_another_type(tmp_path):
    pissa = Pissa(Run(), tmp_path)
    refuses(
        pissa.residual, tmp_path / "trained", "the original has no a; give the model that", original=nn.Sequential()
    )
    other = Run()
    other.a = nn.LayerNorm(20)
    refuses(pissa.residual, tmp_path / "trained", "a of the original is a LayerNorm; only nn.Linear", original=other)
    other.a = nn.Linear(20, 13)
    refuses(
        pissa.residual, tmp_path / "trained", r"a of the original has shape \(13, 20\), but .*\(12, 20", original=other
    )


def test_a_model_that_does_not_fit(tmp_path):
    base = Run()
    Pissa(base, tmp_path)
    refuses(nn.Sequential(), tmp_path / "converted", "the adapter holds a, which this Sequential does not have")
    other = Run()
    other.b = nn.Linear(13, 20)
    refuses(other, tmp_path / "converted", r"b has shape \(20, 13\), but the adapter was made for \(20, 12\)")
    refuses(adapted(Run()), tmp_path / "converted", "a is adapted already; unload the adapter first")
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        ipca.import_peft(base, tmp_path / "converted")
