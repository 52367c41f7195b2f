"""``layer.weight`` as a tensor: what it computes, what costs nothing, what raises, and who else may be handed it."""

import copy
import io
import pickle
import time

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import ipca
from ipca.nn import ConvPC, EmbeddingPC, LinearPC, StackPC, WindowLayer
from ipca.nn.layer_kinds import ExpertStack
from ipca.nn.lazy_weight import LazyWeight
from ipca.nn.registry import layer_class
from ipca.window import Window
from tests.helpers.quantized_layers import KINDS as QUANTIZED
from tests.helpers.quantized_layers import quantized_layer

FORMS = ("residual", "intact")
WAY_OUT = r"Call ipca\.unload\(model\) first.* for a copy to change call \.clone\(\)"


def trained(layer: WindowLayer) -> WindowLayer:
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.add_(0.1 * torch.randn_like(factor))
    return layer


def linear(form: str = "intact", dtype: torch.dtype = torch.float64) -> LinearPC:
    return trained(LinearPC.from_linear(nn.Linear(12, 9, dtype=dtype), rank=3, alpha=2, form=form))


PLAIN = {
    "linear": lambda: nn.Linear(12, 9),
    "conv1d": lambda: transformers.pytorch_utils.Conv1D(9, 12),
    "conv": lambda: nn.Conv2d(4, 9, 3),
    "embedding": lambda: nn.Embedding(12, 9),
    "experts": lambda: ExpertStack(nn.Parameter(torch.randn(2, 9, 12)), False),
    "experts transposed": lambda: ExpertStack(nn.Parameter(torch.randn(2, 12, 9)), True),
}


def every_kind(kind: str) -> WindowLayer:
    plain = quantized_layer(kind, torch.randn(16, 64)) if kind in QUANTIZED else PLAIN[kind]()
    return trained(layer_class(kind).from_layer(plain, Window.middle(3)))


@pytest.fixture
def products(monkeypatch):
    """Which layers' weights were computed."""
    computed, plain = [], WindowLayer.computed_weight

    def counted(layer, **options):
        computed.append(layer)
        return plain(layer, **options)

    monkeypatch.setattr(WindowLayer, "computed_weight", counted)
    return computed


# What it computes.


def pair(form: str) -> tuple[nn.Linear, LinearPC]:
    plain = nn.Linear(24, 40, dtype=torch.float64)
    return plain, trained(LinearPC.from_linear(plain, "middle", rank=6, alpha=3, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_is_what_forward_multiplies_by(form):
    linear, layer = pair(form)
    x = torch.randn(9, 24, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    torch.testing.assert_close(layer.weight, layer.effective_weight())
    with layer.disabled():
        torch.testing.assert_close(layer.weight, linear.weight.detach())
    layer.eval().merge()
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    with layer.disabled():
        torch.testing.assert_close(layer.weight, linear.weight.detach())


@pytest.mark.parametrize("form", FORMS)
def test_a_reader_of_the_weight_trains_the_factors(form):
    _, layer = pair(form)
    x, dy = torch.randn(9, 24, dtype=torch.float64), torch.randn(9, 40, dtype=torch.float64)
    called = torch.autograd.grad(layer(x), [layer.lora_A, layer.lora_B], dy)
    read = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), [layer.lora_A, layer.lora_B], dy)
    for ours, theirs in zip(called, read, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_intact_weight_is_exactly_the_base_before_training():
    linear = nn.Linear(24, 40)
    assert torch.equal(LinearPC.from_linear(linear, rank=6, form="intact").weight, linear.weight)


class Product(torch.autograd.Function):
    """As the kernels of Liger and of Mamba take a weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.stack([row @ weight.T for row in x])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x


class OfOneView(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, columns):
        ctx.save_for_backward(x, columns)
        return x @ columns

    @staticmethod
    def backward(ctx, dy):
        x, columns = ctx.saved_tensors
        return dy @ columns.T, x.T @ dy


READS = {
    "matmul": lambda x, w: x @ w.T,
    "F.linear": lambda x, w: F.linear(x, w),
    "einsum": lambda x, w: torch.einsum("ti,oi->to", x, w),
    "mT": lambda x, w: x @ w.mT,
    "t()": lambda x, w: torch.mm(x, w.t()),
    "row": lambda x, w: x @ w[0],
    "rows": lambda x, w: x @ w[2:5].T,
    "iteration": lambda x, w: torch.stack([x @ row for row in w], dim=-1),
    "view of a view": lambda x, w: x @ w.T.reshape(12, 9)[:, 1:].contiguous(),
    "stacked": lambda x, w: x @ torch.stack([w, 2 * w]).sum(0).T,
    "concatenated": lambda x, w: x @ torch.cat([w, torch.ones_like(w)]).T,
    "to": lambda x, w: x.to(w.dtype) @ w.to(x.dtype).T,
    "functional_call": lambda x, w: functional_call(nn.Linear(12, 9, bias=False, dtype=x.dtype), {"weight": w}, x),
    "checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
    "autograd function": lambda x, w: Product.apply(x, w),
    "autograd function of a view": lambda x, w: OfOneView.apply(x, w.T),
    "norm": lambda x, w: x.sum() * w.norm(),
    "twice": lambda x, w: (x @ w.T) * w.sum(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("read", READS)
def test_what_computes_with_the_weight_gets_its_values_and_trains_the_factors(read, form):
    layer, x = linear(form), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for weight in (layer.weight, layer.computed_weight()):
        y = READS[read](x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED])
def test_every_kind_of_layer(kind, products):
    layer = every_kind(kind)
    weight, wanted = layer.weight, layer.computed_weight()
    products.clear()
    assert (weight.shape, weight.dtype, weight.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert products == []
    assert torch.equal(weight, wanted)
    dy = torch.randn_like(wanted)
    factors = (layer.lora_A, layer.lora_B)
    wanted_grads = torch.autograd.grad(wanted, factors, dy)
    for y, grads in (((layer.weight * dy).sum(), None), (layer.weight, dy)):
        found = torch.autograd.grad(y, factors, grads)
        for got, other in zip(found, wanted_grads, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        layer.weight.data.zero_()


def test_second_derivatives():
    layer, x = linear(), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for weight in (layer.weight, layer.computed_weight()):
        (dA,) = torch.autograd.grad(Product.apply(x, weight).square().sum(), layer.lora_A, create_graph=True)
        results.append(torch.autograd.grad(dA.square().sum(), layer.lora_B))
    torch.testing.assert_close(*results)


def test_a_frozen_factor_gets_no_gradient():
    layer, x = linear(), torch.randn(5, 12, dtype=torch.float64)
    layer.lora_A.requires_grad_(False)
    assert layer.weight.requires_grad
    for y in (x @ layer.weight.T, Product.apply(x, layer.weight)):
        layer.zero_grad()
        y.sum().backward()
        assert layer.lora_A.grad is None
        assert layer.lora_B.grad.any()
    layer.lora_B.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert not (x @ layer.weight.T).requires_grad


def test_a_weight_that_is_held_follows_its_layer():
    layer = linear()
    weight, x = layer.weight, torch.randn(5, 12, dtype=torch.float64)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    for _ in range(3):
        torch.testing.assert_close(x @ weight.T, x @ layer.effective_weight().T)
        with torch.no_grad():
            torch.testing.assert_close(weight + 0, layer.effective_weight())
        F.linear(x, weight).square().sum().backward()  # not the graph of the iteration before
        optimizer.step()
        optimizer.zero_grad()


def test_a_weight_keeps_whether_its_layer_was_disabled():
    plain = nn.Linear(12, 9)
    layer = trained(LinearPC.from_linear(plain, rank=3))
    with layer.disabled():
        base = layer.weight
        assert not base.requires_grad
    assert torch.equal(base, plain.weight)
    assert (layer.weight - base).norm() > 0.1
    weight, wanted = layer.weight, layer.effective_weight()
    with layer.disabled():
        torch.testing.assert_close(weight + 0, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_and_merged(form, merged, products):
    layer = linear(form).eval()
    if merged:
        layer.merge()
    weight = layer.weight
    assert weight.requires_grad is not merged
    assert products == []
    torch.testing.assert_close(weight.detach() + 0, layer.effective_weight())
    with layer.disabled():
        torch.testing.assert_close(layer.weight + 0, layer.pretrained_weight())
        for part in (layer.weight.data, layer.weight.T, layer.weight[0]):
            with torch.no_grad(), pytest.raises(RuntimeError, match=WAY_OUT):
                part.zero_()
    with torch.no_grad(), pytest.raises(RuntimeError, match=WAY_OUT):
        layer.weight.contiguous().zero_()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_chunks_of_one_product(mode, products):
    layer, x = linear(), torch.randn(6, 12, dtype=torch.float64)
    wanted = x @ layer.effective_weight().T
    with mode():
        weight = layer.weight
        assert weight.requires_grad
        y = torch.cat([chunk @ weight.T for chunk in x.split(2)])
    assert len(products) == 1
    assert not y.requires_grad
    torch.testing.assert_close(y, wanted)


def test_an_autograd_function_that_takes_chunks_pays_for_one_product(products):
    layer, x = linear(), torch.randn(6, 12, dtype=torch.float64)
    y = Product.apply(x, layer.weight)
    assert len(products) == 1
    y.sum().backward()
    assert len(products) == 1


def test_a_pointer_lasts_as_long_as_the_weight():
    weight = linear().weight
    pointer = weight.data_ptr()
    kept = [torch.full((9, 12), float("nan"), dtype=torch.float64) for _ in range(9)]
    assert weight.data_ptr() == pointer
    assert weight.untyped_storage().data_ptr() == pointer
    assert pointer not in {tensor.data_ptr() for tensor in kept}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_product_itself_keeps_its_precision(dtype):
    layer, x = linear(dtype=dtype), torch.randn(5, 12, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, layer.weight).dtype == torch.bfloat16
        weight = layer.weight + 0
    assert weight.dtype == layer.weight.dtype == dtype
    assert torch.equal(weight, layer.weight)


# What costs nothing.

METADATA = {
    "dtype": lambda w: w.dtype == torch.float64,
    "device": lambda w: w.device == torch.device("cpu"),
    "shape": lambda w: w.shape == (9, 12) and w.shape[1] == 12,
    "requires_grad": lambda w: w.requires_grad is True,
    "ndim": lambda w: w.ndim == w.dim() == 2,
    "size()": lambda w: w.size() == (9, 12) and w.size(0) == len(w) == 9 and w.size(-1) == 12,
    "numel()": lambda w: w.numel() == torch.numel(w) == 108 and w.nbytes == 864 and w.element_size() == 8,
    "is_floating_point()": lambda w: w.is_floating_point() and torch.is_floating_point(w),
    "is_cuda": lambda w: not (w.is_cuda or w.is_meta or w.is_nested or w.is_sparse) and w.layout == torch.strided,
    "is_leaf": lambda w: not w.is_leaf and w.grad is None,
    "data": lambda w: (w.data.dtype, w.data.shape, w.data.requires_grad) == (torch.float64, (9, 12), False),
    "detach()": lambda w: w.detach().dtype == torch.float64 and not w.detach().requires_grad,
    "a tensor": lambda w: isinstance(w, torch.Tensor) and torch.is_tensor(w) and not isinstance(w, nn.Parameter),
}


@pytest.mark.parametrize("name", METADATA)
def test_what_is_known_costs_no_product(name, products):
    assert METADATA[name](linear().weight)
    assert products == []


def test_the_dtype_of_a_quantized_layer_costs_no_dequantized_weight(monkeypatch):
    from ipca.nn import quantized_linear

    layer = every_kind("torchao-int8")
    monkeypatch.setattr(quantized_linear, "dequantize", lambda module: pytest.fail("dequantized"))
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.ndim) == (torch.float32, (16, 64), 2)


def test_the_dtype_takes_microseconds():
    layer, times = linear(), []
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(50):
            _ = layer.weight.dtype
        times.append((time.perf_counter() - start) / 50)
    print(f"layer.weight.dtype: {1e6 * min(times):.1f} µs")


# What raises.


def augmented(name):
    def write(weight):
        getattr(weight, name)(2)

    return write


def assign(name, value):
    def write(weight):
        setattr(weight, name, value)

    return write


def item(weight):
    weight[0] = 0


def row_of_data(weight):
    weight.data[0] = 0


WRITES = {
    "copy_": lambda w: w.copy_(torch.zeros(9, 12)),
    "zero_": lambda w: w.zero_(),
    "fill_ of a keyword": lambda w: torch.Tensor.fill_(w, value=1.0),
    "uniform_": lambda w: w.uniform_(),
    "clamp_": lambda w: torch.clamp_(w, min=0),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([1]), 0.0),
    "set_": lambda w: w.set_(torch.zeros(9, 12)),
    "resize_": lambda w: w.resize_(3, 3),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "detach_": lambda w: w.detach_(),
    "share_memory_": lambda w: w.share_memory_(),
    "item": item,
    "row": lambda w: w[0].zero_(),
    "rows": lambda w: w[2:5].mul_(2),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "iteration": lambda w: [row.zero_() for row in w],
    "T": lambda w: w.T.mul_(2),
    "view": lambda w: w.view(-1).zero_(),
    "view of a view": lambda w: w.T.T[0][1:].zero_(),
    "contiguous": lambda w: w.contiguous().zero_(),
    "to": lambda w: w.to(w.dtype).zero_(),
    "detach": lambda w: w.detach().mul_(2),
    "data": lambda w: w.data.zero_(),
    "data item": row_of_data,
    "data of data": lambda w: w.data.data.T.zero_(),
    "assign data": assign("data", torch.zeros(9, 12)),
    "assign grad": assign("grad", None),
    "assign requires_grad": assign("requires_grad", False),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "init.normal_": lambda w: nn.init.normal_(w),
    "init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
    "init.orthogonal_": lambda w: nn.init.orthogonal_(w),
    "init.trunc_normal_": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "out": lambda w: torch.add(torch.ones(9, 12), 1, out=w),
    "out of a view": lambda w: torch.add(torch.ones(12), 1, out=w[0]),
    "outs": lambda w: torch.max(torch.ones(12, 9), 0, out=(w[0], torch.zeros(9).long())),
    "inplace": lambda w: F.relu(w, inplace=True),
    "dropout": lambda w: F.dropout(w, 0.5, inplace=True),
    "foreach": lambda w: torch._foreach_mul_([torch.ones(3), w], 2),
    "foreach of views": lambda w: torch._foreach_zero_([w.T]),
    "aten": lambda w: torch.ops.aten.mul_(w, 2),
    "aten.out": lambda w: torch.ops.aten.add.out(torch.ones(9, 12), 1, out=w),
    "without torch functions": lambda w: _without_torch_functions(torch.Tensor.zero_, w),
    **{name: augmented(name) for name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")},
}


def _without_torch_functions(function, *args):
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_raises_with_the_way_out(name, gradients):
    layer = linear(dtype=torch.float32)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=WAY_OUT):
        WRITES[name](layer.weight)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_an_augmented_assignment_raises():
    layer = linear()
    weight = layer.weight
    with torch.no_grad(), pytest.raises(RuntimeError, match=WAY_OUT):
        weight *= 2
    with torch.no_grad(), pytest.raises(RuntimeError, match=WAY_OUT):
        layer.weight -= 1


@pytest.mark.parametrize("name", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_that_would_never_run_raises(name):
    with pytest.raises(RuntimeError, match=r"no gradient of its own: gradients reach lora_A and lora_B"):
        getattr(linear().weight, name)(print)
    with pytest.raises(RuntimeError, match=r"no gradient of its own"):
        linear().weight.retain_grad()


@pytest.mark.parametrize("value", [torch.zeros(9, 12), nn.Parameter(torch.zeros(9, 12)), None], ids=type)
def test_an_assignment_raises_with_the_way_out(value):
    layer = linear("intact")
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=WAY_OUT):
        layer.weight = value
    assert torch.equal(layer.weight, before)


def test_what_writes_elsewhere_is_no_write():
    layer = linear()
    target = torch.zeros(9, 12, dtype=torch.float64)
    with torch.no_grad():
        target.copy_(layer.weight)
        torch.add(target, layer.weight, out=target)
        target.addcmul_(layer.weight, layer.weight).sub_(layer.weight**2)
        torch._foreach_add_([target], [layer.weight])
        torch.testing.assert_close(target, 3 * layer.effective_weight())
        layer.weight.clone().zero_()
        layer.weight.float().zero_()
        layer.weight[[0, 2]].zero_()  # a copy, as of every tensor
    assert F.relu(layer.weight, inplace=False).min() >= 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_optimizer_takes_it(optimizer, frozen):
    layer = linear()
    layer.requires_grad_(not frozen)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        optimizer([layer.weight], lr=0.1)


def test_a_module_does_not_take_it_for_a_parameter():
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):
        nn.Linear(12, 9).weight = linear().weight


# Copies and files.


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_a_layer_is_copied_and_saved_as_before(through):
    model = nn.Sequential(linear(), nn.ReLU())
    _ = model[0].weight.sum()
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert not any("weight" in key for key in model.state_dict() if "base_weight" not in key)
    assert torch.equal(twin[0].weight, model[0].weight)
    with torch.no_grad():
        twin[0].lora_B.zero_()
    assert not torch.equal(twin[0].weight, model[0].weight)


def test_the_weight_itself_is_copied_and_saved_as_any_computed_tensor():
    layer = linear()
    computed = layer.computed_weight()
    for weight in (layer.weight, computed):
        with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
            copy.deepcopy(weight)
    torch.save(layer.weight, file := io.BytesIO())
    file.seek(0)
    for twin in (
        copy.deepcopy(layer.weight.detach()),
        pickle.loads(pickle.dumps(layer.weight)),
        torch.load(file, weights_only=True),
        layer.weight.clone(),
        torch.from_numpy(layer.weight.detach().numpy()),
        torch.tensor(layer.weight.tolist(), dtype=torch.float64),
    ):
        assert type(twin) is torch.Tensor
        assert torch.equal(twin, computed)


# torch.func, torch.compile, export, fake tensors.


def test_gradients_by_torch_func():
    layer, x = linear(), torch.randn(5, 12, dtype=torch.float64)
    factors = {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()}

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return F.linear(x, self.layer.weight)

    def loss(factors, x):
        return functional_call(Reader(), {f"layer.{name}": value for name, value in factors.items()}, x).square().sum()

    found = grad(loss)(factors, x)
    wanted = torch.autograd.grad(F.linear(x, layer.weight).square().sum(), (layer.lora_A, layer.lora_B))
    torch.testing.assert_close(tuple(found.values()), wanted)
    each = vmap(grad(loss), in_dims=(None, 0))(factors, x)
    torch.testing.assert_close(tuple(value.sum(0) for value in each.values()), wanted)
    other = {name: 2 * value for name, value in factors.items()}
    torch.testing.assert_close(loss(other, x), grad_free(layer, other, x))


def grad_free(layer, factors, x):
    with torch.no_grad():
        for name, value in factors.items():
            getattr(layer, name).copy_(value)
        return F.linear(x, layer.effective_weight()).square().sum()


def test_transforms_over_a_weight_that_was_read_outside():
    layer, x = linear(), torch.randn(5, 12, dtype=torch.float64)
    weight, wanted = layer.weight, layer.effective_weight()
    torch.testing.assert_close(vmap(lambda row: wanted @ row)(x), vmap(lambda row: weight @ row)(x))
    torch.testing.assert_close(vmap(lambda row: layer.weight @ row)(x), x @ wanted.T)
    _, tangent = jvp(lambda x: F.linear(x, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ wanted.T)
    slope = grad(lambda x: F.linear(x, layer.weight).sum())(x)
    torch.testing.assert_close(slope, torch.ones(5, 9, dtype=torch.float64) @ wanted)
    torch.testing.assert_close(grad(lambda w: (w**2).sum())(weight), 2 * wanted)


class Reads(nn.Module):
    """As T5 asks for a dtype and MobileBERT and Mamba multiply by a weight that they do not call."""

    def __init__(self, form="intact"):
        super().__init__()
        self.inner, self.out = nn.Linear(12, 12), linear(form, torch.float32)

    def forward(self, x):
        x = self.inner(x)
        if isinstance(self.out.weight, torch.Tensor) and x.dtype != self.out.weight.dtype:
            x = x.to(self.out.weight.dtype)
        return F.linear(x, self.out.weight, self.out.bias) * self.out.weight.shape[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_model_that_reads_a_weight_compiles_whole(form, backend):
    torch._dynamo.reset()
    model, x = Reads(form), torch.randn(5, 12)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for run in (compiled, model):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append((y, *(p.grad for p in (model.out.lora_A, model.out.lora_B, model.inner.weight))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(b, marks=pytest.mark.slow) for b in ("aot_eager", "inductor"))]
)
@pytest.mark.parametrize("read", ["matmul", "view of a view", "autograd function", "checkpoint", "twice"])
def test_a_compiled_function_that_is_handed_a_weight(read, backend):
    torch._dynamo.reset()
    layer, x = linear(), torch.randn(5, 12, dtype=torch.float64)
    compiled = torch.compile(lambda x, w: READS[read](x.to(w.dtype) * w.shape[0], w), backend=backend)
    results = []
    for weight, run in ((layer.weight, compiled), (layer.computed_weight(), lambda x, w: READS[read](9 * x, w))):
        y = run(x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (layer.lora_A, layer.lora_B))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():  # the code of before takes the values of now
        layer.lora_B.mul_(2)
    torch.testing.assert_close(compiled(x, layer.weight), READS[read](9 * x, layer.computed_weight()))


def test_a_compiled_function_does_not_write_into_a_weight():
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: w.mul_(2), backend="aot_eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match=WAY_OUT):
        compiled(linear().weight)


def test_a_whole_graph_of_a_weight_from_outside_is_refused_with_the_way_out():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: x @ w.T, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="pass the layer and read it there"):
        compiled(torch.randn(5, 12, dtype=torch.float64), linear().weight)


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_reads_a_weight_is_exported(strict):
    model, x = Reads().eval(), torch.randn(5, 12)
    exported = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_fake_tensors():
    model, mode = Reads(), FakeTensorMode()
    fake = {name: mode.from_tensor(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    with mode:
        y = functional_call(model, fake, torch.empty(5, 12))
        assert (y.shape, y.dtype) == ((5, 9), torch.float32)
        assert model.out.weight.shape == (9, 12)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert F.linear(torch.empty(5, 12), model.out.weight).shape == (5, 9)


def test_the_meta_device():
    layer = LinearPC(12, 9, 3, device="meta")
    assert layer.weight.is_meta
    assert (torch.empty(5, 12, device="meta") @ layer.weight.T).shape == (5, 9)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        layer.weight.zero_()


# Models that read weights.


def test_t5_asks_for_the_dtype_of_a_weight(products):
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    base = transformers.T5EncoderModel(config).eval().requires_grad_(False)
    ids = torch.randint(0, 40, (2, 5))
    wanted = base(ids).last_hidden_state
    model = ipca.apply_pc(base, rank=3, targets=["wi", "wo"], progress=False)
    assert torch.equal(model(ids).last_hidden_state, wanted)
    assert products == []


class MambaLike(nn.Module):
    """Reads ``out_proj`` in a fused function, as ``mamba_inner_fn`` does."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(12, 12), nn.Linear(12, 9, bias=False)

    def forward(self, x):
        return Product.apply(self.in_proj(x).sigmoid(), self.out_proj.weight)


def test_a_fused_function_over_a_weight_trains_its_factors():
    base, x = MambaLike(), torch.randn(5, 12)
    wanted = base(x).detach()
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, progress=False)
    y = model(x)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    for parameter in ipca.adapter_parameters(model):
        assert parameter.grad.any()
    trained(model.out_proj)
    torch.testing.assert_close(ipca.unload(copy.deepcopy(model))(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("gradients", [False, True])
def test_an_encoder_layer_of_pytorch(gradients):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 5, 16), torch.arange(5)[None] >= torch.tensor([5, 3, 1])[:, None]
    with torch.set_grad_enabled(gradients):
        wanted = encoder(x, src_key_padding_mask=mask)
        ipca.apply_pc(encoder, rank=4, targets=[r"layers\.1\.linear\d"], progress=False)
        found = encoder(x, src_key_padding_mask=mask)
        torch.testing.assert_close(found[~mask], wanted[~mask], rtol=1e-4, atol=1e-5)
        trained(encoder.layers[1].linear1)
        assert not torch.allclose(encoder(x, src_key_padding_mask=mask)[~mask], wanted[~mask], atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_put_by_hand_into_an_encoder_keeps_its_fast_path_right(form):
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        y = encoder(x)
        encoder.linear1 = LinearPC.from_linear(encoder.linear1, rank=4, form=form).eval()
        torch.testing.assert_close(encoder(x), y, atol=1e-5, rtol=1e-5)
        encoder.linear1.lora_B.mul_(3)
        changed = encoder(x)
        encoder.linear1 = encoder.linear1.to_linear()
        assert not torch.allclose(changed, y, atol=1e-2)
        torch.testing.assert_close(encoder(x), changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_concatenates_a_weight_stays_equal_and_trains_it(form):
    config = transformers.MobileBertConfig(
        vocab_size=60,
        hidden_size=32,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    base = transformers.MobileBertForMaskedLM(config).eval()
    ids = torch.randint(0, 60, (2, 7))
    model = ipca.apply_pc(copy.deepcopy(base), rank=4, form=form, progress=False)
    before = base(ids).logits
    y = model(ids).logits
    assert (y - before).abs().max() <= 1e-5 * before.abs().max()
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in ipca.adapter_parameters(model))


def test_the_state_dict_is_that_of_the_parameters():
    layer = linear()
    assert list(layer.state_dict()) == [
        "base_weight", "bias", "lora_A", "lora_B", "lora_A0", "lora_B0", "_extra_state"
    ]  # fmt: skip
    assert "weight" not in dict(layer.named_parameters())
    assert type(layer.weight) is LazyWeight


def test_the_classes_that_are_tested_are_all():
    assert {layer_class(kind) for kind in PLAIN} == {LinearPC, ConvPC, EmbeddingPC, StackPC}
