"""Models with a task head on the command line: the class they are built in, and the head in the adapter's files."""

import json
import warnings

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import ipca
from ipca.cli.main import main
from ipca.io.adapter_folder import read_labels
from ipca.io.model_folder import load_model
from ipca.peft import PCConfig, save_gathered
from ipca.train import save_scaled
from tests.helpers.model_folders import contents

X = torch.arange(24).reshape(2, 12) + 3
CLASSIFIER = T.DistilBertForSequenceClassification


def config(**options):
    return T.DistilBertConfig(vocab_size=97, dim=32, hidden_dim=48, n_layers=1, n_heads=4, **options)


@pytest.fixture
def bare(tmp_path):
    """A folder without a head, as those of pretrained models."""
    torch.manual_seed(0)
    T.DistilBertModel(config()).save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def whole(tmp_path):
    torch.manual_seed(0)
    CLASSIFIER(config(num_labels=3)).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def train(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def native(folder, adapter, labels):
    model = train(ipca.apply_pc(CLASSIFIER.from_pretrained(folder, num_labels=labels), rank=4, progress=False))
    ipca.save_adapter(model, adapter)
    return model(X).logits


def in_peft(folder, adapter, labels):
    chosen = PCConfig(r=4, target_modules=["q_lin"], task_type="SEQ_CLS")
    model = train(get_peft_model(CLASSIFIER.from_pretrained(folder, num_labels=labels), chosen))
    model.save_pretrained(adapter)
    return model(input_ids=X).logits


@pytest.mark.parametrize("labels", [2, 3, 40])
@pytest.mark.parametrize("way", [native, in_peft])
def test_merge_builds_the_class_of_the_adapter(way, labels, bare, tmp_path):
    right = way(bare, tmp_path / "adapter", labels)
    assert main(["merge", str(bare), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")]) == 0
    assert torch.allclose(CLASSIFIER.from_pretrained(tmp_path / "merged").eval()(X).logits, right, atol=1e-5)


NAMES = ("z", "m", "a", "k")


def named(labels):
    names = NAMES[:labels]
    return {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}


def native_named(folder, adapter, labels):
    base = CLASSIFIER.from_pretrained(folder, **named(labels), ignore_mismatched_sizes=True)
    model = train(ipca.apply_pc(base, rank=4, progress=False))
    ipca.save_adapter(model, adapter)
    return model(X).logits


def peft_named(folder, adapter, labels, save=PeftModel.save_pretrained):
    base = CLASSIFIER.from_pretrained(folder, **named(labels), ignore_mismatched_sizes=True)
    model = train(get_peft_model(base, PCConfig(r=4, target_modules=["q_lin"], task_type="SEQ_CLS")))
    save(model, adapter)
    return model(input_ids=X).logits


def gathered_named(folder, adapter, labels):
    return peft_named(folder, adapter, labels, save=save_gathered)


def later_named(folder, adapter, labels):
    """The names are given after the model was wrapped."""
    base = CLASSIFIER.from_pretrained(folder, num_labels=labels, ignore_mismatched_sizes=True)
    model = train(get_peft_model(base, PCConfig(r=4, target_modules=["q_lin"], task_type="SEQ_CLS")))
    model.config.id2label = named(labels)["id2label"]
    model.save_pretrained(adapter)
    return model(input_ids=X).logits


def resumed_unnamed(folder, adapter, labels):
    """The adapter is trained on, on a base without names, and saved again."""
    peft_named(folder, adapter, labels)
    base = CLASSIFIER.from_pretrained(folder, num_labels=labels, ignore_mismatched_sizes=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.config.id2label had")
        model = train(PeftModel.from_pretrained(base, adapter, is_trainable=True))
    model.save_pretrained(adapter)
    return model(input_ids=X).logits


def loaded_unnamed(folder, adapter, labels):
    """The same, natively."""
    native_named(folder, adapter, labels)
    base = CLASSIFIER.from_pretrained(folder, num_labels=labels, ignore_mismatched_sizes=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.config.id2label had")
        model = train(ipca.load_adapter(base, adapter))
    ipca.save_adapter(model, adapter)
    return model(X).logits


def scaled_named(folder, adapter, labels):
    native_named(folder, adapter.parent / "unscaled", labels)
    save_scaled(adapter.parent / "unscaled", adapter, 0.5)
    base = CLASSIFIER.from_pretrained(folder, **named(labels), ignore_mismatched_sizes=True)
    return ipca.load_adapter(base, adapter).eval()(X).logits


WAYS = [native_named, peft_named, gathered_named, later_named, resumed_unnamed, loaded_unnamed, scaled_named]


@pytest.mark.filterwarnings("error:model.config.id2label had")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("base", "labels"), [("bare", 4), ("whole", 2), ("other", 3)])
def test_merge_and_export_write_the_names_of_the_classes(way, base, labels, request, tmp_path):
    folder = request.getfixturevalue(base)
    right = way(folder, tmp_path / "adapter", labels)
    assert main(["merge", str(folder), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")]) == 0
    command = ["export", str(folder), str(tmp_path / "adapter"), "--format", "residual", "-o", str(tmp_path / "out")]
    assert main(command) == 0
    merged = CLASSIFIER.from_pretrained(tmp_path / "merged").eval()
    residual = CLASSIFIER.from_pretrained(tmp_path / "out" / "base")
    exported = PeftModel.from_pretrained(residual, tmp_path / "out" / "adapter").eval()
    for model in (merged, exported):
        assert model.config.id2label == named(labels)["id2label"]
        assert model.config.label2id == named(labels)["label2id"]
        assert torch.allclose(model(input_ids=X).logits, right, atol=1e-5)


@pytest.fixture
def other(tmp_path):
    """A folder whose head has three of the names in another order."""
    torch.manual_seed(0)
    CLASSIFIER(config(id2label=dict(enumerate("kzm")))).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_a_loaded_adapter_names_its_classes(other, bare, tmp_path):
    native_named(bare, tmp_path / "adapter", 3)
    for folder in (bare, other):
        model = CLASSIFIER.from_pretrained(folder, num_labels=3)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ipca.load_adapter(model, tmp_path / "adapter", check_base=False)
        said = [str(each.message) for each in seen]
        assert said == ([] if folder == bare else [MOVED])
        assert (model.config.id2label, model.config.label2id) == tuple(named(3).values())


MOVED = "model.config.id2label had k, z, m, and has the classes of the adapter now: z, m, a."


def test_init_writes_the_names_of_the_classes(other, bare, tmp_path):
    assert main(["init", str(other), "--rank", "4", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert read_labels(tmp_path / "out") == ("k", "z", "m")
    options = ["--class", "DistilBertForSequenceClassification", "--rank", "4", "--quiet"]
    assert main(["init", str(bare), *options, "-o", str(tmp_path / "bare_out")]) == 0
    assert read_labels(tmp_path / "bare_out") == ()
    assert "labels" not in json.loads((tmp_path / "bare_out" / "ipca.json").read_text())


def test_a_head_that_the_adapter_does_not_hold_is_not_made_up(whole, tmp_path, capsys):
    native_named(whole, tmp_path / "adapter", 2)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if ".classifier." not in key}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main(["merge", str(whole), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")]) == 1
    assert "classifier.bias, classifier.weight for another number of classes" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("format", ["peft", "residual"])
def test_export_keeps_the_head(format, bare, tmp_path):
    right, out = native(bare, tmp_path / "adapter", 3), tmp_path / "out"
    assert main(["export", str(bare), str(tmp_path / "adapter"), "--format", format, "-o", str(out)]) == 0
    base, adapter = (bare, out) if format == "peft" else (out / "base", out / "adapter")
    model = PeftModel.from_pretrained(CLASSIFIER.from_pretrained(base, num_labels=3), adapter).eval()
    assert torch.allclose(model(X).logits, right, atol=1e-5)


def test_a_class_that_no_file_names_is_asked_for(bare, tmp_path, capsys):
    right, adapter, merged = native(bare, tmp_path / "adapter", 3), tmp_path / "adapter", tmp_path / "merged"
    written = json.loads((adapter / "adapter_config.json").read_text())
    del written["auto_mapping"]
    (adapter / "adapter_config.json").write_text(json.dumps(written))
    command = ["merge", str(bare), str(adapter), "-o", str(merged)]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "the adapter holds the module 'pre_classifier', which this model does not have; name the class" in said
    assert said.endswith("such as --class DistilBertForSequenceClassification.\n")
    assert not merged.exists()
    assert main([*command, "--class", "DistilBertForSequenceClassification"]) == 0
    assert torch.allclose(CLASSIFIER.from_pretrained(merged).eval()(X).logits, right, atol=1e-5)


@pytest.mark.parametrize("name", ["NoSuchModel", "BertForSequenceClassification", "DistilBertConfig"])
def test_a_class_that_does_not_fit_is_refused(name, bare, tmp_path, capsys):
    assert main(["init", str(bare), "--class", name, "-o", str(tmp_path / "out")]) == 1
    assert f"no class '{name}' for a model of the type 'distilbert'; an example is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_with_random_weights_is_not_written(bare, tmp_path, capsys):
    model = ipca.apply_pc(T.DistilBertModel.from_pretrained(bare), rank=4, progress=False)
    ipca.save_adapter(model, tmp_path / "adapter")
    command = ["merge", str(bare), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")]
    assert main([*command, "--class", "DistilBertForMaskedLM"]) == 1
    assert "does not have" in capsys.readouterr().err
    inside = T.DistilBertForMaskedLM.from_pretrained(bare)
    ipca.apply_pc(inside, rank=4, exclude=["vocab.*"], progress=False)
    ipca.save_adapter(inside, tmp_path / "inside")
    assert main(["merge", str(bare), str(tmp_path / "inside"), "-o", str(tmp_path / "merged")]) == 1
    assert "which would be random in this DistilBertForMaskedLM" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("form", ["intact", "residual"])
def test_init_writes_the_head_of_the_model(form, whole, tmp_path):
    out = tmp_path / "out"
    assert main(["init", str(whole), "--rank", "4", "--form", form, "-o", str(out), "--quiet"]) == 0
    model = ipca.apply_pc(load_model(whole), rank=4, form=form, progress=False)
    if form == "intact":
        ipca.save_adapter(model, tmp_path / "here", base_model=str(whole))
        made, saved = contents(out), contents(tmp_path / "here")
        record = json.loads(made.pop("ipca.json"))
        assert record.pop("initial") is True
        assert record == json.loads(saved.pop("ipca.json"))
        assert made == saved
        again = ipca.load_adapter(load_model(whole), out)
        assert [name for name, _ in ipca.summary(again).modules_to_save] == ["pre_classifier", "classifier"]
    else:
        stock = PeftModel.from_pretrained(load_model(out / "base"), out / "adapter").eval()
        assert torch.allclose(stock(X).logits, load_model(whole)(X).logits, atol=1e-5)


def test_init_of_a_class_with_a_new_head_writes_that_head(bare, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--class", "DistilBertForSequenceClassification", "--rank", "4"]
    assert main(["init", str(bare), *options, "-o", str(out)]) == 0
    assert "fully trained: pre_classifier (1,056), classifier (66)" in capsys.readouterr().out
    torch.manual_seed(1)
    one = ipca.load_adapter(CLASSIFIER.from_pretrained(bare), out).eval()
    torch.manual_seed(2)
    two = ipca.load_adapter(CLASSIFIER.from_pretrained(bare), out).eval()
    assert torch.equal(one(X).logits, two(X).logits)
    assert one.classifier.weight.requires_grad
