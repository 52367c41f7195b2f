"""apply_pc: all of it or nothing, whatever fails or interrupts, and an honest summary."""

import contextlib
import copy
import inspect
import os
import signal
import threading

import pytest
import torch
from torch import nn

import ipca
import ipca.model.apply
import ipca.nn.initialization
import ipca.peft
from ipca import Window
from ipca.lab import baselines
from ipca.lab.continual import ContinualLearner
from ipca.model import AdapterSettings
from ipca.nn import LinearPC
from tests.helpers.models import snapshot

pytestmark = pytest.mark.filterwarnings("ignore:'all-linear' leaves out .*out_proj")  # of nn.TransformerEncoder

FORMS = ("residual", "intact")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(20, 12), nn.Linear(12, 20), nn.Linear(20, 5)
        self.a.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()))


def on_call(number: int, function, action):
    """``function``, with ``action`` run before its call of that number."""
    calls = 0

    def wrapped(*args, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return function(*args, **options)

    return wrapped


def raising(error: BaseException):
    def action():
        raise error

    return action


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LinearPC)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("no convergence"), "^b: no convergence$"),
        (ValueError("bad"), "^b: bad$"),
        (MemoryError("full"), "full"),
        (torch.linalg.LinAlgError("singular"), "singular"),
        (KeyboardInterrupt(), None),
    ],
    ids=repr,
)
def test_failure_in_the_middle_of_the_decompositions(error, words, monkeypatch):
    monkeypatch.setattr(ipca.svd.cache, "window_svd", on_call(2, ipca.svd.cache.window_svd, raising(error)))
    model = Plain()
    before = snapshot(model)
    with pytest.raises(type(error), match=words):
        ipca.apply_pc(model, rank=2, progress=False)
    assert snapshot(model) == before


def test_missed_certificate_names_the_layer(monkeypatch):
    plain = ipca.nn.initialization.frozen_weight

    def planted(weight, *args, **options):
        return plain(weight, *args, **options) + (0.1 if weight.shape[0] == 5 else 0.0)

    monkeypatch.setattr(ipca.nn.initialization, "frozen_weight", planted)
    model = Plain()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"^head: the effective weight is off by .* before training"):
        ipca.apply_pc(model, rank=2, form="residual", progress=False)
    assert snapshot(model) == before
    ipca.apply_pc(model, rank=2, form="intact", progress=False)


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run with it ignored, as in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_between_decompositions(monkeypatch):
    interrupt = on_call(3, ipca.svd.cache.window_svd, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(ipca.svd.cache, "window_svd", interrupt)
    model = Plain()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        ipca.apply_pc(model, rank=2, progress=False)
    assert snapshot(model) == before


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("call", [1, 2, 3])
def test_interrupt_while_layers_are_replaced_waits_until_all_are(call, monkeypatch):
    from_factors = on_call(call, LinearPC.from_factors, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(LinearPC, "from_factors", from_factors)
    model, x = Plain(), torch.randn(4, 20)
    y = model(x)
    with pytest.raises(KeyboardInterrupt):
        ipca.apply_pc(model, rank=2, form="intact", progress=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert adapted_names(model) == ["a", "b", "head"]
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert torch.equal(model(x), y)


def test_works_in_another_thread():
    model = Plain()
    errors = []

    def work():
        try:
            ipca.apply_pc(model, rank=2, progress=False)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert adapted_names(model) == ["a", "b", "head"]


OURS = {"rank": 3, "alpha": 6.0, "dropout": 0.25, "targets": ["a", "b"]}
PEFTS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}


def test_the_names_of_peft_mean_the_same():
    models = [Plain(), Plain(), Plain()]
    theirs = {PEFTS[name]: value for name, value in OURS.items()}
    for model, options in zip(models, (OURS, theirs, OURS | theirs), strict=True):
        ipca.apply_pc(model, progress=False, **options)
        layers = {name: model.get_submodule(name) for name in adapted_names(model)}
        assert {name: (layer.rank, layer.alpha, layer.dropout) for name, layer in layers.items()} == {
            "a": (3, 6.0, 0.25),
            "b": (3, 6.0, 0.25),
        }


@pytest.mark.parametrize("function", [ipca.apply_pc, AdapterSettings.__init__, LinearPC.__init__, LinearPC.from_linear])
def test_every_option_is_an_explicit_typed_keyword(function):
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name != "self"]
    assert not any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in parameters)
    assert all(each.annotation is not each.empty for each in parameters)


@pytest.mark.parametrize(("name", "other"), [("rank", 4), ("alpha", 3.0), ("dropout", 0.0), ("targets", ["a"])])
def test_two_names_of_one_argument_with_different_values(name, other):
    model = Plain()
    before = snapshot(model)
    with pytest.raises(TypeError, match=rf"{name}=.* and {PEFTS[name]}=.* are two names of one argument; pass one"):
        ipca.apply_pc(model, progress=False, **OURS, **{PEFTS[name]: other})
    assert snapshot(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training):
    model = ipca.apply_pc(Plain().train(training), rank=2, dropout=0.5, progress=False)
    assert {module.training for module in model.modules()} == {training}
    ipca.unload(model)
    assert {module.training for module in model.modules()} == {training}


def test_a_second_call_adapts_more_layers():
    model, x = Plain(), torch.randn(4, 20)
    y = model(x)
    ipca.apply_pc(model, rank=2, targets="a", form="intact", progress=False)
    first = model.a
    ipca.apply_pc(model, rank=3, exclude=["a"], form="intact", progress=False)
    assert model.a is first
    assert torch.equal(model(x), y)
    assert len(list(ipca.adapter_parameters(model))) == 6
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot adapt a, b, head: it is adapted already; unload the adapter first"):
        ipca.apply_pc(model, rank=2, progress=False)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_adapter_dtype(name):
    dtype = getattr(torch, name)
    model, x = Plain(), torch.randn(4, 20)
    y = model(x)
    ipca.apply_pc(model, rank=2, form="intact", adapter_dtype=name, progress=False)
    assert {p.dtype for p in ipca.adapter_parameters(model)} == {dtype}
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_sixteen_bit_models_get_float32_factors(form, dtype):
    model, x = Plain().to(dtype), torch.randn(4, 20, dtype=dtype)
    y = model(x)
    ipca.apply_pc(model, rank=2, form=form, progress=False)
    assert {p.dtype for p in ipca.adapter_parameters(model)} == {torch.float32}
    assert model.a.weight.dtype == dtype
    off = (model(x) - y).norm() / y.norm()
    assert off <= (0.0 if form == "intact" else 8 * torch.finfo(dtype).eps)
    assert ipca.summary(model).worst_start[3] == str(dtype).removeprefix("torch.")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("form", FORMS)
def test_transformer_encoder_with_a_padding_mask(form):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 5, 16), torch.arange(5)[None] >= torch.tensor([5, 3, 1])[:, None]
    slow = copy.deepcopy(encoder)
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=mask)
        assert not y[mask].any()  # the fast path ran: it leaves zeros where there is padding
        ipca.apply_pc(encoder, rank=4, form=form, progress=False)
        assert torch.allclose(encoder(x, src_key_padding_mask=mask)[~mask], y[~mask], rtol=1e-4, atol=1e-5)
        assert torch.allclose(encoder(x), slow(x), rtol=1e-4, atol=1e-5)
        for parameter in ipca.adapter_parameters(encoder):
            parameter.add_(0.2 * torch.randn_like(parameter))
        trained = encoder(x, src_key_padding_mask=mask)
        wanted = ipca.unload(copy.deepcopy(encoder))(x, src_key_padding_mask=mask)
    assert (trained - y)[~mask].norm() > 0.1 * y[~mask].norm()
    assert torch.allclose(trained[~mask], wanted[~mask], rtol=1e-4, atol=1e-5)


def test_encoder_layer_alone_reflects_its_factors():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        y = layer(x)
        ipca.apply_pc(layer, rank=4, form="intact", progress=False)
        assert torch.allclose(layer(x), y, rtol=1e-4, atol=1e-5)
        layer.linear2.lora_B.zero_()
        assert not torch.allclose(layer(x), y, rtol=1e-2)


def test_summary_accounts_for_the_model():
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 12))
    with torch.no_grad():
        model[3].weight.copy_(torch.eye(12))  # every window cuts a tie
    plain = sum(p.numel() for p in model.parameters())
    options = {"rank": 2, "alpha": 5, "rank_pattern": {"3": 4}, "form": "residual"}
    found = ipca.summary(ipca.apply_pc(model, progress=False, **options))
    factors = 3 * 2 * 32 + 4 * 24
    assert (found.layers, found.trainable, found.total) == (4, factors, plain + factors)
    assert found.windows == (
        (2, (12, 20), 5, 2, 5.0, "residual", "weight", "both"),
        (1, (20, 12), 5, 2, 5.0, "residual", "weight", "both"),
        (1, (12, 12), 4, 4, 5.0, "residual", "weight", "both"),
    )
    assert [name for name, _ in found.uncertified] == ["3"]
    assert 0 < found.worst_residual < 1e-12
    assert found.svd_seconds > 0
    name, relative, largest, dtype = found.worst_start
    layer = model.get_submodule(name)
    assert (layer.certificate.relative, layer.certificate.max_abs) == (relative, largest)
    assert relative == max(m.certificate.relative for m in model)
    assert dtype == "float32"


def test_summary_reads_as_a_table():
    model = ipca.apply_pc(Plain(), window=Window(1, 2), alpha=5, form="intact", exclude=["head"], progress=False)
    lines = str(ipca.summary(model)).splitlines()
    assert lines[0] == "2 layers adapted, 128 of 745 parameters train (17.18 %)"
    assert " ".join(lines[1].split()) == "1 × (12, 20) window [1, 3) of 12 alpha 5 intact"
    assert " ".join(lines[2].split()) == "1 × (20, 12) window [1, 3) of 12 alpha 5 intact"
    assert lines[3].startswith("window SVD: ")
    assert lines[3].endswith("2 of 2 windows certified")
    assert lines[4] == "before training: worst ‖W_eff − W‖/‖W‖ = 0.0e+00, max|W_eff − W| = 0.0e+00 (float32, layer a)"
    with torch.no_grad():
        model.b.base_weight.copy_(torch.eye(20, 12))
    tied = ipca.apply_pc(ipca.unload(model, merge=False), rank=2, targets="b", progress=False)
    assert "  not certified: b: the window's edge at index 5 cuts a tie" in str(ipca.summary(tied))
    assert str(ipca.summary(Plain())).startswith("0 layers adapted, 605 of 617 parameters")


def test_progress_bar_can_be_silenced(capfd):
    ipca.apply_pc(Plain(), rank=2, progress=False)
    assert capfd.readouterr() == ("", "")
    ipca.apply_pc(Plain(), rank=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err


@pytest.mark.parametrize("failing", [False, True])
def test_disabled_comes_back(failing):
    model, x = Plain().eval(), torch.randn(4, 20)
    base = model(x)
    ipca.apply_pc(model, rank=2, form="intact", progress=False)
    with torch.no_grad():
        model.b.lora_B.mul_(3)
    y = model(x)
    with contextlib.suppress(OSError), ipca.disabled(model):
        assert torch.equal(model(x), base)
        if failing:
            raise OSError(os.strerror(5))
    assert torch.equal(model(x), y)
    assert not torch.equal(y, base)


LAZY = {
    "linear": (lambda: nn.LazyLinear(4), "extra.weight, extra.bias"),
    "convolution": (lambda: nn.LazyConv1d(4, 3), "extra.weight, extra.bias"),
    "statistics only": (
        lambda: nn.LazyInstanceNorm1d(track_running_stats=True, affine=False),
        "extra.running_mean, extra.running_var",
    ),
}
WAYS = {
    "apply_pc": lambda model, folder: ipca.apply_pc(model, rank=2, targets=["a"], progress=False),
    "load_adapter": lambda model, folder: ipca.load_adapter(model, folder, check_base=False),
    "baseline": lambda model, folder: baselines.apply(model, "lora", AdapterSettings(rank=2, targets=("a",)), seed=0),
    "continual": lambda model, folder: continual(model),
    "prepare": lambda model, folder: ipca.peft.prepare(model, ipca.peft.PCConfig(r=2, target_modules=["a"])),
}


def continual(model):
    ContinualLearner(model, "fresh", AdapterSettings(rank=2, targets=("a",))).begin_task()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    ipca.save_adapter(ipca.apply_pc(Plain(), rank=2, targets=["a"], progress=False), folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_module_is_refused_before_it_has_parameters(kind, way, adapter):
    build, names = LAZY[kind]
    model = Plain()
    model.extra = build()
    before, trains = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match=rf"^{names}: a lazy module of this Plain .* run one batch through"):
        WAYS[way](model, adapter)
    assert [type(m) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == trains
    assert "lora_A" not in str(model.state_dict().keys())


def test_a_lazy_module_that_has_run_is_adapted():
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(8))
    model(torch.randn(2, 6))
    assert adapted_names(ipca.apply_pc(model, rank=2, progress=False)) == ["0", "1"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", ["a", "b", "model"])
def test_weights_made_in_inference_mode_are_refused(part, way, adapter):
    model = Plain()
    with torch.inference_mode():
        made = Plain()
    if part == "model":
        model = made
    else:
        setattr(model, part, getattr(made, part))
    before = snapshot(model)
    name = "a" if part == "model" else part
    with pytest.raises(RuntimeError, match=rf"^{name}.weight.*: made within torch\.inference_mode\(\), .*never train"):
        WAYS[way](model, adapter)
    assert snapshot(model) == before
    copied = copy.deepcopy(model)
    WAYS[way](copied, adapter)
    copied(torch.randn(3, 20)).sum().backward()


def test_an_adapter_that_does_not_train_loads_onto_weights_made_in_inference_mode(adapter):
    with torch.inference_mode():
        model = Plain()
    x = torch.randn(3, 20)
    expected = ipca.load_adapter(copy.deepcopy(model), adapter, check_base=False)(x)
    assert torch.equal(ipca.load_adapter(model, adapter, check_base=False, trainable=False)(x), expected)
