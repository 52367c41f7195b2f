import json
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import ipca
import ipca.svd.cache
from ipca.cli import main


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    BertModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("a\nb\n")
    return tmp_path / "bert"


def output(folder):
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(6)[None]).last_hidden_state


def test_inspect_lists_layers_and_draws(bert, tmp_path, capsys):
    assert main(["inspect", str(bert), "--rank", "4", "--window", "0.25", "--plot", str(tmp_path / "s.png")]) == 0
    text = capsys.readouterr().out
    assert "encoder.layer.0.intermediate.dense" in text
    assert "[7, 11)" in text  # floor(0.25 * (32 − 4))
    assert "7 layers" in text
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_reports_the_singular_values_of_the_model(bert, capsys):
    assert main(["inspect", str(bert), "--json", "--targets", "query", "--rank", "4"]) == 0
    record = json.loads(capsys.readouterr().out)
    (row,) = record["layers"]
    weight = BertModel.from_pretrained(bert).encoder.layer[0].attention.self.query.weight.detach().double()
    S = torch.linalg.svdvals(weight)
    assert row["window"] == [14, 18]
    assert row["window_sigma"] == pytest.approx([S[14].item(), S[17].item()])
    assert row["window_energy"] == pytest.approx((S[14:18].square().sum() / S.square().sum()).item())
    assert record["totals"]["trainable"] == 4 * 64


@pytest.mark.parametrize("form", ["peft", "residual"])
def test_init_export_and_merge_keep_the_function(bert, tmp_path, form):
    adapter, merged, exported = tmp_path / "adapter", tmp_path / "merged", tmp_path / "exported"
    assert main(["init", str(bert), "--rank", "4", "-o", str(adapter)]) == 0
    assert main(["merge", str(bert), str(adapter), "-o", str(merged)]) == 0
    assert main(["export", str(bert), str(adapter), "--form", form, "-o", str(exported)]) == 0
    torch.testing.assert_close(output(merged), output(bert), atol=1e-5, rtol=0)
    assert (merged / "vocab.txt").read_text() == "a\nb\n"
    folder = exported / "adapter" if form == "residual" else exported
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == (4 if form == "residual" else 8)


def test_merge_folds_in_what_was_trained(bert, tmp_path):
    model = ipca.apply_pc(BertModel.from_pretrained(bert).eval(), rank=4, progress=False)
    with torch.no_grad():
        for p in ipca.adapter_parameters(model):
            p.add_(0.05 * torch.randn_like(p))
        trained = model(torch.arange(6)[None]).last_hidden_state
    ipca.save_adapter(model, tmp_path / "adapter")
    assert main(["merge", str(bert), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")]) == 0
    assert (trained - output(bert)).abs().max() > 1e-2
    torch.testing.assert_close(output(tmp_path / "merged"), trained, atol=1e-5, rtol=0)


def test_init_residual_writes_a_base_and_an_adapter_for_it(bert, tmp_path):
    assert main(["init", str(bert), "--rank", "4", "--form", "residual", "-o", str(tmp_path / "out")]) == 0
    residual = BertModel.from_pretrained(tmp_path / "out" / "base").encoder.layer[0].attention.self.query.weight
    S = torch.linalg.svdvals(residual.detach().double())
    assert (S[-4:] < 1e-6 * S[0]).all()  # the window is gone from the base


def test_a_model_with_conv1d_layers_merges(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "gpt2")
    assert main(["init", str(tmp_path / "gpt2"), "--rank", "4", "-o", str(tmp_path / "adapter")]) == 0
    assert main(["merge", str(tmp_path / "gpt2"), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")]) == 0
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(6)[None]
    torch.testing.assert_close(merged(ids).logits, base(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "{bert}", "--rank", "0", "-o", "{out}"], "rank must be at least 1"),
        (["init", "{bert}", "--rank", "33", "-o", "{out}"], "there are only 32"),
        (["init", "{bert}", "--window", "start=30", "-o", "{out}"], "ends at 46"),
        (["init", "{bert}", "--window", "nonsense", "-o", "{out}"], "Unknown window"),
        (["init", "{bert}", "--targets", "nowhere", "-o", "{out}"], "no module matches the target 'nowhere'"),
        (["init", "{out}/none", "-o", "{out}"], "no config.json"),
        (["init", "{bert}", "-o", "{bert}/config.json"], "is not a folder"),
        (["merge", "{bert}", "{bert}", "-o", "{out}"], "no adapter_model.safetensors"),
        (["merge", "{bert}", "{bert}", "-o", "{bert}"], "is not empty"),
        (["demo", "--text", "{out}/none.tar.gz", "-o", "{out}"], "pip download"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(bert, tmp_path, capfd, arguments, message):
    names = {"bert": bert, "out": tmp_path / "out"}
    before = {path: path.stat().st_mtime_ns for path in bert.rglob("*")}
    assert main([word.format(**names) for word in arguments]) == 1
    captured = capfd.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("ipca: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in bert.rglob("*")} == before


def test_a_broken_model_folder_is_an_error(bert, tmp_path, capsys):
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert main(["init", str(bert), "-o", str(tmp_path / "out")]) == 1
    assert "ipca: error:" in capsys.readouterr().err


def test_debug_shows_the_traceback(bert, tmp_path):
    with pytest.raises(ValueError, match="rank must be at least 1"):
        main(["init", str(bert), "--rank", "0", "--debug", "-o", str(tmp_path / "out")])


def test_an_interrupt_is_one_line(bert, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ipca.svd.cache, "window_svd", interrupt)
    assert main(["init", str(bert), "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "ipca: interrupted; nothing was left half-written"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["", "inspect", "init", "merge", "export", "cache", "cache prune", "demo"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_python_m_ipca_runs_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "ipca", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ipca {ipca.__version__}"
