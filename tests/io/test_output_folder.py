"""One rule for folders that are written: what the same call would not go on from is refused, or replaced on request."""

import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertModel

import ipca
from ipca.cli.main import main
from tests.helpers.model_folders import contents
from tests.helpers.models import snapshot

WEIGHTS, CONFIG, SIDECAR = "adapter_model.safetensors", "adapter_config.json", "ipca.json"


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, vocab_size=50))


def trained(targets="query", rank=4, seed=1, **options) -> BertModel:
    model = ipca.apply_pc(bert(), rank=rank, targets=targets, progress=False, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, its adapter, a PiSSA adapter, and by name what an output folder may hold."""
    top = tmp_path_factory.mktemp("folders")
    bert().save_pretrained(top / "model")
    ipca.save_adapter(trained(), top / "adapter")
    config = LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa")
    get_peft_model(bert(), config).save_pretrained(top / "pissa")
    held = top / "held"
    ipca.save_adapter(trained("value", 8), held / "another adapter")
    ipca.save_adapter(trained(seed=2), held / "the same windows")
    ipca.export(trained("value"), held / "a stock LoRA")
    ipca.export(trained("value"), held / "a truncated one", format="truncated", rank=2)
    bert().save_pretrained(held / "a model")
    (held / "weights").mkdir()
    (held / "weights" / "pytorch_model.bin").write_bytes(b"weights")
    (held / "an old config").mkdir()
    (held / "an old config" / CONFIG).write_text("{}")
    (held / "notes").mkdir()
    (held / "notes" / "notes.txt").write_text("mine")
    return top


HELD = ("another adapter", "the same windows", "a stock LoRA", "a truncated one", "a model", "weights", "an old config")
COMMANDS = {
    "init": ("init", "{top}/model", "--rank", "4", "--targets", "query"),
    "init residual": ("init", "{top}/model", "--rank", "4", "--targets", "query", "--form", "residual"),
    "merge": ("merge", "{top}/model", "{top}/adapter"),
    "export": ("export", "{top}/model", "{top}/adapter"),
    "export serve": ("export", "{top}/model", "{top}/adapter", "--format", "serve"),
    "export residual": ("export", "{top}/model", "{top}/adapter", "--format", "residual"),
    "export truncated": ("export", "{top}/model", "{top}/adapter", "--format", "truncated", "--rank", "2"),
    "convert": ("convert", "{top}/model", "{top}/pissa"),
}
WHOLE = ("init residual", "merge", "export residual")
"""Commands that write a folder as a whole."""


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_what_they_would_not_go_on_from(command, held, folders, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(folders / "held" / held, out)
    before = contents(out)
    words = [word.format(top=folders) for word in COMMANDS[command]]
    assert main([*words, "-o", str(out), "--quiet"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"ipca: error: {out} ")
    assert "; choose a" in error
    beside = held in ("a model", "weights") and command not in WHOLE  # which stay
    assert error.endswith(f". --force {'writes beside it' if beside else 'replaces it'}.")
    assert contents(out) == before


@pytest.mark.parametrize("held", ["another adapter", "a truncated one", "notes"])
@pytest.mark.parametrize("command", COMMANDS)
def test_force_replaces_it(command, held, folders, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(folders / "held" / held, out)
    words = [word.format(top=folders) for word in COMMANDS[command]]
    assert main([*words, "-o", str(tmp_path / "new"), "--quiet"]) == 0
    assert main([*words, "-o", str(out), "--force", "--quiet"]) == 0, capsys.readouterr().err
    new, there = contents(tmp_path / "new"), contents(out)
    assert there.pop("notes.txt", b"mine") == b"mine"
    assert there.keys() == new.keys()
    assert all(there[name] == new[name] for name in new if not name.endswith(CONFIG))  # which may name its own base


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {*WHOLE}))
def test_other_files_stay(command, folders, tmp_path):
    shutil.copytree(folders / "held" / "notes", tmp_path / "out")
    words = [word.format(top=folders) for word in COMMANDS[command]]
    assert main([*words, "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_to_an_empty_or_a_new_folder_will_do(command, there, folders, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    words = [word.format(top=folders) for word in COMMANDS[command]]
    assert main([*words, "-o", str(tmp_path / "link"), "--quiet"]) == 0, capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "new"), "--quiet"]) == 0
    made = contents(tmp_path / "disk" / "real")
    assert (tmp_path / "link").is_symlink()
    assert made.keys() == contents(tmp_path / "new").keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_force_never_replaces_what_is_read(command, folders, tmp_path, capsys):
    for name in ("model", "adapter", "pissa"):
        shutil.copytree(folders / name, tmp_path / name)
    before = contents(tmp_path)
    words = [word.format(top=tmp_path) for word in COMMANDS[command]]
    for out in {"model", words[2].rpartition("/")[2]} & {"model", "adapter", "pissa"}:
        assert main([*words, "-o", str(tmp_path / out), "--force", "--quiet"]) == 1
        assert "itself" in capsys.readouterr().err
        assert contents(tmp_path) == before


def test_init_goes_on_from_its_own_adapter_and_force_starts_over(folders, tmp_path, monkeypatch, capsys):
    words = ["init", str(folders / "model"), "--targets", "query", "key", "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*words, "--rank", "4"]) == 0
    assert main([*words, "--rank", "4"]) == 0
    import ipca.svd.cache

    plain, calls = ipca.svd.cache.window_svd, []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ipca.svd.cache, "window_svd", stop)
        assert main([*words, "--rank", "2"]) == 130
    assert main([*words, "--rank", "3"]) == 1
    assert "or start over with --force" in capsys.readouterr().err
    assert main([*words, "--rank", "3", "--force"]) == 0
    model = ipca.load_adapter(bert(), tmp_path / "out")
    assert {layer.rank for layer in model.modules() if isinstance(layer, ipca.nn.WindowLayer)} == {3}


# -- in Python


def save(model, folder, **options):
    ipca.save_adapter(model, folder, **options)


def export(model, folder, **options):
    ipca.export(model, folder, **options)


@pytest.mark.parametrize("held", sorted({*HELD} - {"a model", "weights", "an old config", "the same windows"}))
@pytest.mark.parametrize("write", [save, export])
def test_another_adapter_is_refused_and_nothing_changes(write, held, folders, tmp_path):
    out, model = tmp_path / "out", trained()
    shutil.copytree(folders / "held" / held, out)
    before, unchanged = contents(out), snapshot(model)
    with pytest.raises(FileExistsError, match=r"out holds an adapter .*; choose another folder\. overwrite=True repl"):
        write(model, out)
    assert contents(out) == before
    assert snapshot(model) == unchanged
    write(model, out, overwrite=True)
    write(model, tmp_path / "new")
    assert contents(out) == contents(tmp_path / "new")


CHANGES = {
    "rank": {"rank": 3},
    "window": {"window": "minor"},
    "layers": {"targets": ["query", "key"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_same_adapter_is_saved_again(change, folders, tmp_path):
    ipca.save_adapter(trained(), tmp_path / "out")
    ipca.save_adapter(trained(seed=3), tmp_path / "out")
    ipca.save_adapter(trained(seed=3, alpha=2.0, form="residual"), tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds an adapter"):
        ipca.save_adapter(trained(**CHANGES[change]), tmp_path / "out")
    other = bert()
    with torch.no_grad():
        other.encoder.layer[0].attention.self.query.weight.add_(1e-3)
    ipca.apply_pc(other, rank=4, targets="query", progress=False)
    with pytest.raises(FileExistsError, match="holds an adapter"):
        ipca.save_adapter(other, tmp_path / "out")


def test_an_export_never_takes_the_place_of_a_checkpoint(tmp_path):
    model = trained()
    ipca.save_adapter(model, tmp_path)
    before = contents(tmp_path)
    for format in ("peft", "serve", "residual"):
        with pytest.raises(FileExistsError, match="; choose a"):
            ipca.export(model, tmp_path, format=format)
    assert contents(tmp_path) == before


def test_an_adapter_may_lie_in_a_training_checkpoint(tmp_path):
    for name in ("model.safetensors", "optimizer.pt", "training_args.bin", "trainer_state.json"):
        (tmp_path / name).write_bytes(b"theirs")
    ipca.save_adapter(trained(), tmp_path)
    ipca.save_adapter(trained(), tmp_path)
    ipca.save_adapter(trained("value"), tmp_path, overwrite=True)
    assert all(contents(tmp_path)[name] == b"theirs" for name in ("model.safetensors", "optimizer.pt"))


MARKS = ("trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_3.pth")
MARKS += ("random_states_0.pkl", "scaler.pt", "global_step20/mp_rank_00_model_states.pt", "optimizer_0/.metadata")


@pytest.mark.parametrize("mark", MARKS)
def test_each_mark_of_a_training_checkpoint_will_do(mark, tmp_path):
    bert().save_pretrained(tmp_path)
    (tmp_path / mark).parent.mkdir(exist_ok=True)
    (tmp_path / mark).write_bytes(b"theirs")
    ipca.save_adapter(trained(), tmp_path)
    assert (tmp_path / mark).read_bytes() == b"theirs"


@pytest.mark.parametrize("beside", ["training_args.bin", "optimizer.pt.bak", "README.md", "my_scheduler.pt"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_finished_model_is_not_taken_for_a_training_checkpoint(weights, beside, tmp_path):
    bert().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / weights)
    (tmp_path / beside).write_bytes(b"theirs")
    before, model = contents(tmp_path), trained()
    with pytest.raises(FileExistsError, match=r" holds \S+; choose another folder\. overwrite=True writes beside it\."):
        ipca.save_adapter(model, tmp_path)
    assert contents(tmp_path) == before
    ipca.save_adapter(model, tmp_path, overwrite=True)
    assert before.items() <= contents(tmp_path).items()


BACKUPS = ("adapter_model.safetensors.bak", "adapter_model.step100.safetensors", "adapter_model.old.bin")


@pytest.mark.parametrize("name", BACKUPS)
def test_a_backup_of_an_adapter_stays(name, folders, tmp_path):
    ipca.save_adapter(trained(), tmp_path / "out")
    shutil.copy(tmp_path / "out" / WEIGHTS, tmp_path / "out" / name)
    before = (tmp_path / "out" / name).read_bytes()
    ipca.save_adapter(trained(seed=2), tmp_path / "out")
    ipca.save_adapter(trained("value"), tmp_path / "out", overwrite=True)
    ipca.export(trained("value"), tmp_path / "out", overwrite=True)
    words = [word.format(top=folders) for word in COMMANDS["init"]]
    assert main([*words, "-o", str(tmp_path / "out"), "--force", "--quiet"]) == 0
    assert (tmp_path / "out" / name).read_bytes() == before


def test_what_peft_wrote_in_pieces_goes_with_the_adapter(tmp_path):
    ipca.save_adapter(trained(), tmp_path)
    (tmp_path / "adapter_model.safetensors.index.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"older")
    ipca.save_adapter(trained(seed=2), tmp_path)
    assert contents(tmp_path).keys() == {WEIGHTS, CONFIG, SIDECAR}


class WithNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = torch.nn.Linear(20, 12), torch.nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(self.a(x))


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(bert().config)


def test_a_trained_head_is_not_lost_to_an_untrained_adapter(tmp_path, capsys):
    classifier().save_pretrained(tmp_path / "model")
    words = ["init", str(tmp_path / "model"), "--rank", "4", "-o", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 0
    assert main(words) == 0  # init goes on from its own
    assert main([*words, "--window", "minor"]) == 0
    model = ipca.load_adapter(BertForSequenceClassification.from_pretrained(tmp_path / "model"), tmp_path / "out")
    with torch.no_grad():
        model.classifier.weight.add_(1.0)  # a linear probe: the factors are as they were
    ipca.save_adapter(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert main(words) == 1
    assert "holds an adapter that is trained or not readable; choose another folder. --force" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="holds an adapter that is trained"):
        ipca.export(ipca.apply_pc(classifier(), rank=2, progress=False), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_adapter_with_a_whole_module_is_not_lost_to_one_without(tmp_path):
    plain, whole = (ipca.apply_pc(WithNorm(), rank=3, targets="a", modules_to_save=m) for m in ([], ["norm"]))
    with torch.no_grad():  # what is not trained yet may be replaced
        plain.a.lora_B.mul_(2)
        whole.a.lora_B.mul_(3)
    ipca.save_adapter(plain, tmp_path)
    ipca.save_adapter(whole, tmp_path)  # which holds all that was there
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="holds an adapter"):
        ipca.save_adapter(plain, tmp_path)
    assert contents(tmp_path) == before
    ipca.save_adapter(plain, tmp_path, overwrite=True)


# -- what is read is never written

FORMATS = {name: {"format": name} for name in ("peft", "serve", "residual")}
FORMATS["truncated"] = {"format": "truncated", "rank": 4}


@pytest.mark.parametrize(
    "write",
    [save, *(partial(export, overwrite=True, **options) for options in FORMATS.values())],
    ids=["save", *FORMATS],
)
def test_the_folder_of_the_base_is_refused_in_python_too(write, tmp_path):
    bert().save_pretrained(tmp_path / "top" / "base")
    model = BertModel.from_pretrained(tmp_path / "top" / "base")
    ipca.apply_pc(model, rank=4, targets="query", progress=False)
    model(torch.zeros(1, 3, dtype=torch.long))
    before = contents(tmp_path)
    residual = isinstance(write, partial) and write.keywords["format"] == "residual"
    out = tmp_path / "top" / ("." if residual else "base")
    with pytest.raises(ValueError, match=r"base is the model itself.*; choose another folder"):
        write(model, out)
    assert contents(tmp_path) == before


def test_a_residual_export_spares_the_base_and_the_adapter_in_its_folder(folders, tmp_path, capsys):
    for model, adapter, words in (("top/base", "adapter", "base is the model"), ("model", "top/adapter", "is the ada")):
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(folders / "model", tmp_path / model)
        shutil.copytree(folders / "adapter", tmp_path / adapter)
        before = contents(tmp_path)
        arguments = [
            str(tmp_path / model),
            str(tmp_path / adapter),
            "--format",
            "residual",
            "-o",
            str(tmp_path / "top"),
        ]
        assert main(["export", *arguments, "--force"]) == 1
        assert f"{words}" in capsys.readouterr().err
        assert contents(tmp_path) == before


# -- nothing that nothing could load


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a.lora_B", "norm.weight"])
def test_factors_and_modules_that_are_not_finite_replace_nothing(where, value, tmp_path):
    model = ipca.apply_pc(WithNorm(), rank=3, targets="a", modules_to_save=["norm"])
    model(torch.ones(2, 20))
    ipca.save_adapter(model, tmp_path / "out")
    before = contents(tmp_path)
    with torch.no_grad():
        model.get_parameter(where).view(-1)[0] = value
    words = rf"^{where}.* holds NaN or Inf: nothing was written"
    with pytest.raises(ValueError, match=words):
        ipca.save_adapter(model, tmp_path / "out")
    for format, options in {"peft": {}, "residual": {}, "truncated": {"rank": 2}}.items():
        with pytest.raises(ValueError, match=r"holds NaN or Inf"):
            ipca.export(model, tmp_path / "new", format=format, **options)
    assert contents(tmp_path) == before
    if where == "a.lora_B":
        unchanged = snapshot(model)
        with pytest.raises(ValueError, match=r"^a: its factors hold NaN or Inf"):
            ipca.unload(model)
        assert snapshot(model) == unchanged
        assert bool(ipca.unload(model, merge=False).a.weight.isfinite().all())


@pytest.mark.parametrize("write", [save, export])
def test_an_empty_name_is_not_the_current_folder(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the folder's name is empty; for the current folder give '\.'"):
        write(trained(), "")
    assert contents(tmp_path) == {}
