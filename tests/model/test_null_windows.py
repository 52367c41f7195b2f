"""Windows whose singular values are 0: reported, trained as plain LoRA is, saved and resumed."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import ipca
from ipca.cli.main import main
from ipca.peft import PCConfig, prepare
from ipca.peft import summary as peft_summary
from tests.helpers.layer_kinds import mixtral
from tests.helpers.model_folders import contents


class Net(nn.Module):
    """A layer with singular values, and others of which all or some are 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 40, padding_idx=0)
        self.plain, self.blank, self.pruned, self.edge = (nn.Linear(40, 40) for _ in range(4))
        with torch.no_grad():
            self.table.weight[1:20] = 0
            self.blank.weight.zero_()
            self.pruned.weight[:30] = 0  # rank 10, before the middle window [18, 22)
            self.edge.weight[:, :20] = 0  # rank 20, within it

    def forward(self, ids):
        return self.edge(self.pruned(self.plain(self.table(ids)))) + self.blank(self.table(ids))


NULL = {"table": (4, 4), "plain": (0, 4), "blank": (4, 4), "pruned": (4, 4), "edge": (2, 4)}
NAMED = tuple((name, *counts) for name, counts in NULL.items() if counts[0])
IDS = torch.arange(30).reshape(3, 10)


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(IDS) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["intact", "residual"])
def test_null_components_train_and_are_named_in_one_line(form, dtype, tmp_path):
    base, model = Net().to(dtype), Net().to(dtype)
    with pytest.warns(UserWarning, match="4 of 4 of table, 4 of 4 of blank, 4 of 4 of pruned and 1 more") as said:
        ipca.apply_pc(model, rank=4, targets=list(NULL), form=form, progress=False)
    assert len(said) == 1
    assert ipca.summary(model).null == NAMED
    assert "4 of 4 of blank, " in str(ipca.summary(model))
    start = {name: layer.lora_B.detach().clone() for name, layer in ipca.model.apply.adapted_layers(model).items()}
    for name in ("blank", "pruned"):
        layer = model.get_submodule(name)
        assert not layer.lora_B0.any()
        assert torch.equal(layer.weight, base.get_submodule(name).weight)
        assert layer.lora_A0.abs().max() <= 40**-0.5
    if form == "intact":
        assert torch.equal(model(IDS), base(IDS))
    train(model)
    for name, B in start.items():
        assert (model.get_submodule(name).lora_B != B).any(dim=0).all()
    assert not model.table(torch.tensor(0)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing starts here
        ipca.save_adapter(model, tmp_path)
        again = ipca.load_adapter(copy.deepcopy(base), tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(again.eval()(IDS), model(IDS))
    assert ipca.summary(again).null == NAMED
    if dtype == torch.float32:
        stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.allclose(stock(IDS), model(IDS), atol=1e-5)


@pytest.mark.parametrize("prepared", [False, True])
def test_null_components_in_peft(prepared, tmp_path):
    config, base = PCConfig(r=4, target_modules=list(NULL)), Net()
    if prepared:
        prepare(base, config, progress=False)
    with pytest.warns(UserWarning, match="4 of 4 of table, 4 of 4 of blank, 4 of 4 of pruned and 1 more"):
        model = peft.get_peft_model(copy.deepcopy(base), config)
    assert peft_summary(model).null == NAMED
    with pytest.warns(UserWarning, match="components that are 0"):
        native = ipca.apply_pc(Net(), rank=4, targets=list(NULL), progress=False)
    A, B = native.blank.lora_A, native.blank.lora_B
    assert torch.equal(model.base_model.model.blank.lora_A["default"].weight, A)
    assert torch.equal(model(IDS), base(IDS))
    train(model)
    assert model.base_model.model.blank.lora_B["default"].weight.ne(B).any(dim=0).all()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = peft.PeftModel.from_pretrained(Net(), tmp_path, config=PCConfig.from_pretrained(tmp_path))
    assert torch.equal(again.eval()(IDS), model(IDS))
    assert torch.allclose(ipca.load_adapter(Net(), tmp_path).eval()(IDS), model(IDS), atol=1e-6)


def with_a_blank_expert():
    torch.manual_seed(0)
    model = mixtral()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1].zero_()
    return model.eval()


def test_one_expert_of_zeros_in_a_stack_trains(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    model, ids = with_a_blank_expert(), torch.arange(24).reshape(2, 12)
    experts = len(model.model.layers[0].mlp.experts.down_proj)
    right = model(ids).logits
    with pytest.warns(UserWarning, match=f"3 of {3 * experts} of {name}"):
        ipca.apply_pc(model, rank=3, targets=[name], progress=False)
    assert ipca.summary(model).null == ((name, 3, 3 * experts),)
    assert torch.equal(model(ids).logits, right)
    layer = model.get_submodule(name)
    assert layer.lora_A0[1].any()
    assert not layer.lora_B0[1].any()
    assert layer.lora_B0[0].any(dim=0).all()
    model(ids).logits.square().mean().backward()
    assert layer.lora_B.grad[1].any()
    ipca.save_adapter(model, tmp_path)
    again = ipca.load_adapter(with_a_blank_expert(), tmp_path).get_submodule(name)
    for key, value in layer.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_command_line_writes_the_same_factors_and_names_them(tmp_path, capsys):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    base = BertModel(BertConfig(**sizes, vocab_size=50)).eval()
    with torch.no_grad():
        base.encoder.layer[0].output.dense.weight.zero_()
    base.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="components")
        assert main(["init", str(tmp_path / "base"), "--rank", "4", "-o", str(tmp_path / "out")]) == 0
    assert "components that are 0 in the window: 4 of 4 of encoder.layer.0.output.dense;" in capsys.readouterr().out
    with pytest.warns(UserWarning, match=r"encoder\.layer\.0\.output\.dense"):
        model = ipca.apply_pc(BertModel.from_pretrained(tmp_path / "base"), rank=4, progress=False)
    ipca.save_adapter(model, tmp_path / "here", base_model=str(tmp_path / "base"))
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


def test_a_weight_with_singular_values_is_not_touched():
    torch.manual_seed(0)
    linear = nn.Linear(48, 40)
    for scale in (1.0, 1e-20):
        linear.weight.data *= scale
        for window in ("principal", "middle", "minor"):
            layer = ipca.nn.LinearPC.from_linear(linear, window, rank=4)
            assert layer.lora_B0.any(dim=0).all()
