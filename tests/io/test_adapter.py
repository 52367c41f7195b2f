"""save_adapter and load_adapter: round trips, resumed training, and errors that change nothing."""

import copy
import signal
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import ipca
import ipca.nn.initialization
from ipca import Window
from ipca.nn import LinearPC
from tests.helpers.models import snapshot

FORMS = ("residual", "intact")


class Net(nn.Module):
    def __init__(self, width: int = 20):
        super().__init__()
        self.a, self.b = nn.Linear(width, 12), nn.Linear(12, width, bias=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.norm(x + self.b(self.a(x).relu())))


def jitter(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(model: nn.Module, **options) -> nn.Module:
    options = {"rank": 3, "alpha": 5.0, "modules_to_save": ["norm"], **options}
    return jitter(ipca.apply_pc(model, progress=False, **options))


@pytest.fixture
def pair():
    """A base and a trained copy of it."""
    base = Net()
    return base, adapted(copy.deepcopy(base))


def refuses(model: nn.Module, folder, words: str, **options) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        ipca.load_adapter(model, folder, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("new", [None, *FORMS])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip_without_an_svd(form, new, tmp_path, monkeypatch):
    base = Net()
    options = {"dropout": 0.2, "rank_pattern": {"a": 4}, "window_pattern": {"b": "minor"}, "alpha_pattern": {"a": 7.5}}
    model = adapted(copy.deepcopy(base), form=form, **options)
    ipca.save_adapter(model, tmp_path / "deep" / "folder")
    monkeypatch.setattr(ipca.svd.cache, "window_svd", lambda *a, **k: pytest.fail("an SVD ran"))
    assert ipca.load_adapter(base, tmp_path / "deep" / "folder", form=new) is base
    x = torch.randn(6, 20)
    y, back = model.eval()(x), base.eval()(x)
    assert (back - y).norm() <= (0.0 if new in (None, form) else 1e-5) * y.norm()
    if new in (None, form):
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    for name in ("a", "b", "head"):
        mine, theirs = base.get_submodule(name), model.get_submodule(name)
        assert (mine.rank, mine.alpha, mine.window, mine.dropout) == (
            (theirs.rank, theirs.alpha, theirs.window, theirs.dropout)
        )
        assert mine.form == (new or form)
        assert mine.svd_report == theirs.svd_report
        assert mine.certificate.holds
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert [(name, p.requires_grad) for name, p in base.named_parameters()] == flags


@pytest.mark.parametrize(
    ("saved", "options", "measured"),
    [
        ("residual", {}, 0),
        ("residual", {"check_base": False}, 3),  # the weight may be another one
        ("intact", {"form": "residual"}, 3),
        ("residual", {"form": "intact"}, 0),
        ("intact", {}, 0),
    ],
)
def test_the_start_is_measured_where_its_certificate_is_not_recorded(saved, options, measured, tmp_path, monkeypatch):
    base = Net()
    model = adapted(copy.deepcopy(base), form=saved)
    ipca.save_adapter(model, tmp_path)
    plain, calls = ipca.nn.initialization.measure_init, []
    monkeypatch.setattr(ipca.nn.initialization, "measure_init", lambda *a, **k: calls.append(a) or plain(*a, **k))
    ipca.load_adapter(base, tmp_path, **options)
    assert len(calls) == measured
    residual = options.get("form", saved) == "residual"
    for name in ("a", "b", "head"):
        certificate = base.get_submodule(name).certificate
        assert certificate.holds
        assert (certificate.bound > 0) == residual
        assert "form" in options or certificate == model.get_submodule(name).certificate


def test_a_cast_residual_layer_forgets_its_certificate(tmp_path):
    base = Net()
    model = adapted(copy.deepcopy(base), form="residual").to(torch.bfloat16)
    assert all(model.get_submodule(name).certificate is None for name in ("a", "b", "head"))
    ipca.save_adapter(model, tmp_path)
    assert ipca.load_adapter(base, tmp_path).a.certificate.holds


def test_untrainable_adapter_is_frozen(pair, tmp_path):
    base, model = pair
    ipca.save_adapter(model, tmp_path)
    ipca.load_adapter(base, tmp_path, trainable=False)
    assert not any(p.requires_grad for p in base.parameters())
    ipca.load_adapter(base, tmp_path)
    assert sum(p.requires_grad for p in base.parameters()) == 8


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(8, 20, generator=generator), torch.randn(8, 5, generator=generator)
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("where", ["fresh base", "in place", "merged in place"])
@pytest.mark.parametrize("form", FORMS)
def test_resumed_training_repeats_the_losses_exactly(form, where, tmp_path):
    base = Net()
    model = adapted(copy.deepcopy(base), form=form)
    optimizer = torch.optim.AdamW(ipca.adapter_parameters(model), lr=1e-2)
    steps(model, optimizer, 5)
    ipca.save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    wanted = steps(model, optimizer, 5)
    layer = model.a
    resumed = base if where == "fresh base" else model
    if where == "merged in place":
        ipca.merge_adapter(model)
    ipca.load_adapter(resumed, tmp_path)
    assert where == "fresh base" or model.a is layer
    optimizer = torch.optim.AdamW(ipca.adapter_parameters(resumed), lr=1e-2)
    optimizer.load_state_dict(state)
    assert steps(resumed, optimizer, 5) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip_of_other_dtypes(form, dtype, tmp_path):
    base = Net().to(dtype)
    model = adapted(copy.deepcopy(base), form=form)
    ipca.save_adapter(model, tmp_path)
    ipca.load_adapter(base, tmp_path)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())


def test_round_trip_of_a_transformers_model(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, vocab_size=40)
    base = transformers.BertForSequenceClassification(config).eval()
    model = adapted(copy.deepcopy(base), modules_to_save=["classifier"])
    ipca.save_adapter(model, tmp_path)
    ipca.load_adapter(base, tmp_path)
    ids = torch.randint(0, 40, (3, 7))
    assert torch.equal(base(ids).logits, model(ids).logits)
    assert torch.equal(base.classifier.weight, model.classifier.weight)
    assert base.classifier.weight.requires_grad


def test_layers_in_a_model_of_ones_own(tmp_path):
    plain = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5))
    first, second = (nn.Sequential(LinearPC(20, 12, 3), nn.ReLU(), LinearPC(12, 5, 2)) for _ in range(2))
    first.load_state_dict(plain.state_dict())
    ipca.save_adapter(jitter(first), tmp_path)
    refuses(second, tmp_path, r"0: this is not the base weight the adapter was made on \(its values differ\)")
    second.load_state_dict(plain.state_dict())
    ipca.load_adapter(second, tmp_path)
    ipca.load_adapter(plain, tmp_path)
    x = torch.randn(4, 20)
    assert torch.equal(second(x), first(x))
    assert torch.equal(plain(x), first(x))


def test_another_base_is_refused_unless_told_otherwise(pair, tmp_path):
    base, model = pair
    ipca.save_adapter(model, tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.b.weight[3, 4] += 1e-6
    refuses(
        other, tmp_path, r"^b: this is not the base weight the adapter was made on \(its values differ\).*check_base"
    )
    ipca.load_adapter(other, tmp_path, check_base=False)
    x = torch.randn(4, 20)
    assert torch.allclose(other(x), model(x), rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(base).to(torch.bfloat16)
    refuses(half, tmp_path, r"^a: this is not the base weight .*\(it is bfloat16 here and was float32\)")
    ipca.load_adapter(half, tmp_path, check_base=False)
    assert (half(x.bfloat16()) - model(x)).norm() <= 0.05 * model(x).norm()


def test_bases_of_another_shape_are_refused(pair, tmp_path):
    base, model = pair
    ipca.save_adapter(model, tmp_path)
    no_b = copy.deepcopy(base)
    no_b.b = nn.Identity()
    refuses(no_b, tmp_path, "cannot adapt b: it is a Identity, not an nn.Linear")
    del no_b.b
    refuses(no_b, tmp_path, "the adapter holds b, which this Net does not have")
    wide = copy.deepcopy(base)
    wide.head = nn.Linear(20, 6)
    refuses(wide, tmp_path, r"head has shape \(6, 20\), but the adapter was made for \(5, 20\)")
    wide.norm = nn.LayerNorm(21)
    refuses(wide, tmp_path, r"norm: the adapter holds .*\(20,\).* this model has .*\(21,\)")
    wide.norm = nn.LayerNorm(20, bias=False)
    refuses(wide, tmp_path, "norm: the adapter holds")
    del wide.norm
    refuses(wide, tmp_path, "the adapter holds the module 'norm', which this model does not have")
    base.a.register_forward_hook(print)
    refuses(base, tmp_path, "cannot adapt a: it has hooks")


def test_models_adapted_in_another_way_are_refused(pair, tmp_path):
    base, model = pair
    ipca.save_adapter(model, tmp_path)
    refuses(model, tmp_path, "a has form intact, the adapter residual; load onto the plain base", form="residual")
    cases = {
        "a has alpha 3.0, the adapter 5.0; load onto the plain base": {"alpha": 3.0},
        "a has rank 2, the adapter 3": {"rank": 2},
        "a starts from other factors than the adapter": {"window": Window(0, 3), "rank": None},
        "the adapter holds a, which is not adapted in this model": {"exclude": ["a"]},
    }
    for words, options in cases.items():
        refuses(adapted(copy.deepcopy(base), **options), tmp_path, words)
    ipca.save_adapter(adapted(copy.deepcopy(base), exclude=["b"]), tmp_path, overwrite=True)
    refuses(model, tmp_path, "b is adapted, but the adapter in .* does not hold it; unload it first")


def test_interrupt_while_loading_leaves_a_whole_model(pair, tmp_path, monkeypatch):
    base, model = pair
    ipca.save_adapter(model, tmp_path)
    from_factors = LinearPC.from_factors

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return from_factors(*args, **options)

    monkeypatch.setattr(LinearPC, "from_factors", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ipca.load_adapter(base, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    x = torch.randn(4, 20)
    assert torch.equal(base(x), model(x))


def grow(model):
    model.extra = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Net, "this Net has no LinearPC layer"),
        (lambda: LinearPC(8, 8, 2), "the model is itself a LinearPC; save its state_dict, or put it into a module"),
        (lambda: nn.Sequential(LinearPC(8, 8, 2, device="meta")), "0 has no window yet; load its weights first"),
        (
            lambda: grow(model := adapted(Net())) or model,
            "Net trains parameters of its own beside the adapted a",
        ),
        (lambda: adapted(Net()).requires_grad_(True), "a: its weight or bias trains"),
    ],
    ids=["plain", "itself", "meta", "own", "trains"],
)
def test_what_an_adapter_file_cannot_hold(build, words, tmp_path):
    model = build()
    for write in (ipca.save_adapter, ipca.export):
        with pytest.raises(ValueError, match=words):
            write(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_model_cast_after_apply_names_the_dtype_of_its_base(tmp_path):
    base = nn.Sequential(nn.Linear(20, 12))
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), rank=2, progress=False).to(torch.bfloat16), tmp_path)
    with pytest.raises(ValueError, match="it is bfloat16 here and was float32"):
        ipca.load_adapter(copy.deepcopy(base).to(torch.bfloat16), tmp_path)


class Tied(nn.Module):
    """Calls ``a``, and reads the weights of ``b`` and, only for its dtype, ``c``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.a(x).to(self.c.weight.dtype)
        return nn.functional.linear(x, self.b.weight) + self.c(x)


def test_a_layer_that_the_model_reads_and_does_not_call_is_named(tmp_path):
    base, x = Tied(), torch.randn(3, 8)
    model = ipca.apply_pc(copy.deepcopy(base), rank=2, progress=False)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipca.save_adapter(model, tmp_path / "start")  # nothing has changed yet, which every reader computes
    with pytest.raises(ValueError, match=r"^b: the model reads the weight"):  # W_res alone is wrong from the start
        ipca.export(model, tmp_path / "out", format="residual")
    jitter(model)
    right = model(x)
    with pytest.warns(
        RuntimeWarning, match=r"^b: the model reads the weight .*exclude them, or call ipca\.unload"
    ) as said:
        ipca.save_adapter(model, tmp_path / "saved")
    assert len(said) == 1
    again = ipca.load_adapter(copy.deepcopy(base), tmp_path / "saved")
    assert torch.equal(again(x), right)
    before = copy.deepcopy(model.state_dict())
    for format in ("peft", "residual", "serve"):
        for adapted in (model, ipca.load_adapter(copy.deepcopy(base), tmp_path / "saved")):  # one that has not run yet
            with pytest.raises(ValueError, match=r"^b: the model reads the weight"):
                ipca.export(adapted, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Either(nn.Module):
    """Calls ``a``, or reads its weight, as a setting says."""

    def __init__(self):
        super().__init__()
        self.a, self.reads = nn.Linear(8, 8), False

    def forward(self, x):
        return nn.functional.linear(x, self.a.weight, self.a.bias) if self.reads else self.a(x)


def test_a_layer_that_may_be_read_is_named_until_the_model_has_called_it(tmp_path):
    model = ipca.apply_pc(Either(), rank=2, progress=False)
    with pytest.warns(UserWarning, match=r"^a: the model calls the layer or reads its weight.*; run the model once"):
        ipca.export(model, tmp_path / "unseen", format="residual")
    model(torch.randn(3, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipca.export(model, tmp_path / "called", format="residual")
    model = ipca.apply_pc(Either(), rank=2, progress=False)
    model.reads = True
    model(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"^a: the model reads the weight and does not call the layer"):
        ipca.export(model, tmp_path / "read", format="residual")


def test_a_layer_that_is_called_too_is_not_named(tmp_path):
    model = jitter(ipca.apply_pc(Tied(), rank=2, targets=["a", "c"], progress=False))
    model(torch.randn(3, 8))
    model.a.weight.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipca.save_adapter(model, tmp_path)


def tied_llama(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, **{"tie_word_embeddings": True, **options})
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("load", [ipca.load_adapter, ipca.import_peft], ids=["load_adapter", "import_peft"])
def test_a_whole_module_is_not_loaded_into_a_tied_weight(load, whole, tmp_path):
    peft = pytest.importorskip("peft")
    from ipca.peft import PCConfig

    model = peft.get_peft_model(tied_llama(), PCConfig(r=2, target_modules=["q_proj"], modules_to_save=[whole]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    base = tied_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"{whole}: .* is tied to .*; untie them .* load the adapter with peft"):
        load(base, tmp_path)
    assert snapshot(base) == before
    untied = tied_llama(tie_word_embeddings=False)  # the way out that the message names
    untied.load_state_dict(base.state_dict())
    x = torch.arange(12)[None]
    torch.testing.assert_close(load(untied, tmp_path)(x).logits, model.eval()(x).logits)


def test_a_head_that_another_adapter_trained_is_not_kept_silently(tmp_path):
    base = Net()
    ipca.save_adapter(adapted(copy.deepcopy(base), modules_to_save=[], targets=["a", "b"]), tmp_path)
    other = adapted(copy.deepcopy(base), modules_to_save=["head"], targets=["a", "b"])
    words = "head trains whole in this model, and the adapter in .* does not hold it; load onto the plain base"
    refuses(other, tmp_path, words)
    refuses(ipca.unload(other, merge=False), tmp_path, words)  # which leaves the head as it was trained


def test_a_compiled_head_is_named_before_it_is_written(tmp_path):
    model = adapted(Net(), modules_to_save=["head"], targets=["a", "b"])
    model.head = torch.compile(model.head)
    with pytest.raises(
        ValueError, match=r"head\._orig_mod belongs to a wrapper, not to the model; save the model with"
    ):
        ipca.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
