import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import ipca
import ipca.svd.cache
from ipca.cli import commands
from ipca.cli.arguments import parser
from ipca.cli.main import main

COMMANDS = ("inspect", "init", "merge", "export", "convert", "cache", "completion")


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


@pytest.mark.parametrize("format", ["peft", "residual"])
def test_init_export_and_merge_keep_the_function(bert, tmp_path, format):
    adapter, merged, exported = tmp_path / "adapter", tmp_path / "merged", tmp_path / "exported"
    assert main(["init", str(bert), "--rank", "4", "-o", str(adapter)]) == 0
    assert main(["merge", str(bert), str(adapter), "-o", str(merged)]) == 0
    assert main(["export", str(bert), str(adapter), "--format", format, "-o", str(exported)]) == 0
    torch.testing.assert_close(output(merged), output(bert), atol=1e-5, rtol=0)
    assert (merged / "vocab.txt").read_text() == "a\nb\n"
    folder = exported / "adapter" if format == "residual" else exported
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == (4 if format == "residual" else 8)


STALE = ("rust_model.ot", "model.gguf", "MODEL-Q4.GGUF", "model.onnx", "model.onnx_data", "flax_model.msgpack")
STALE += ("pytorch_model.bin", "tf_model.h5", "weights.npz", "model.ckpt", "consolidated.00.pth", "model.tflite")
COMPANIONS = ("LICENSE", "tokenizer.json", "vocab.txt", "chat_template.jinja", "spiece.model", "tekken.tiktoken")
COPYING = {
    "merge": ("merge", "{model}", "{adapter}"),
    "export": ("export", "{model}", "{adapter}", "--format", "residual"),
    "init": ("init", "{model}", "--rank", "4", "--form", "residual"),
}


@pytest.mark.parametrize("command", COPYING)
def test_weights_of_the_model_before_the_change_are_left_out_and_named(command, bert, tmp_path, capsys):
    assert main(["init", str(bert), "--rank", "4", "-o", str(tmp_path / "adapter"), "--quiet"]) == 0
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    for name in (*STALE, *COMPANIONS):
        (model / name).write_bytes(b"old")
    with (model / "unknown.format").open("wb") as file:
        file.truncate(101 * 2**20)  # takes no space
    capsys.readouterr()
    words = [word.format(model=model, adapter=tmp_path / "adapter") for word in COPYING[command]]
    with pytest.warns(RuntimeWarning, match="left out, as they are weights of .* before the change") as said:
        assert main([*words, "-o", str(tmp_path / "out")]) == 0
    made = tmp_path / "out" / ("" if command == "merge" else "base")
    there = {path.name for path in made.iterdir()}
    assert {*COMPANIONS} <= there
    assert not {*STALE, "unknown.format"} & there
    (line,) = [str(each.message) for each in said if "left out" in str(each.message)]
    assert all(name in line for name in (*STALE, "unknown.format"))
    assert "model.safetensors" not in line


def test_the_usual_files_need_no_warning(bert, tmp_path, recwarn):
    assert main(["init", str(bert), "--rank", "4", "-o", str(tmp_path / "adapter"), "--quiet"]) == 0
    shutil.copytree(bert, tmp_path / "model")
    (tmp_path / "model" / "training_args.bin").write_bytes(b"pickle")
    words = ["merge", str(tmp_path / "model"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 0
    assert not [str(each.message) for each in recwarn if "left out" in str(each.message)]


def test_force_leaves_no_stale_weights_beside_the_new_ones(bert, tmp_path):
    assert main(["init", str(bert), "--rank", "4", "-o", str(tmp_path / "adapter"), "--quiet"]) == 0
    (tmp_path / "out").mkdir()
    for name in (*STALE, "notes.txt"):
        (tmp_path / "out" / name).write_bytes(b"old")
    words = ["merge", str(bert), str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--force", "--quiet"]
    assert main(words) == 0
    assert not {*STALE} & {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "notes.txt").exists()


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


def test_convert_writes_what_the_adapter_was(bert, tmp_path, capsys):
    model = ipca.apply_pc(BertModel.from_pretrained(bert).eval(), rank=4, progress=False)
    with torch.no_grad():
        for p in ipca.adapter_parameters(model):
            p.add_(0.05 * torch.randn_like(p))
    ipca.save_adapter(model, tmp_path / "adapter", base_model=str(bert))
    ipca.export(model, tmp_path / "stock")
    capsys.readouterr()
    command = ["convert", str(bert), str(tmp_path / "stock"), "-o", str(tmp_path / "ours"), "--json"]
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["layers"], record["uncertified"], record["base"]) == (7, {}, str(bert))
    assert 0 < record["worst_residual"] < 1e-6
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "adapter"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_convert_a_pissa_adapter_of_a_residual_base(bert, tmp_path, capsys):
    config = LoraConfig(r=3, init_lora_weights="pissa", target_modules=["query", "dense"])
    tuned = get_peft_model(BertModel.from_pretrained(bert), config)
    tuned.save_pretrained(tmp_path / "pissa")
    tuned.unload().save_pretrained(tmp_path / "residual")
    capsys.readouterr()
    command = ["convert", str(tmp_path / "residual"), str(tmp_path / "pissa"), "-o", str(tmp_path / "ours")]
    assert main([*command, "--original", str(bert)]) == 0
    assert "window [0, 3) of 32" in capsys.readouterr().out
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bert)
    assert main(["merge", str(bert), str(tmp_path / "ours"), "-o", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(output(tmp_path / "merged"), output(bert), atol=1e-5, rtol=0)


def test_export_states_the_error_of_a_truncated_lora(bert, tmp_path, capsys):
    model = ipca.apply_pc(BertModel.from_pretrained(bert).eval(), rank=4, targets="query", progress=False)
    with torch.no_grad():
        for p in ipca.adapter_parameters(model):
            p.add_(0.05 * torch.randn_like(p))
    ipca.save_adapter(model, tmp_path / "adapter")
    command = ["export", str(bert), str(tmp_path / "adapter"), "--format", "truncated", "--rank", "2"]
    assert main([*command, "-o", str(tmp_path / "small")]) == 0
    text = capsys.readouterr().out
    assert main([*command, "-o", str(tmp_path / "again"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    ((name, error),) = record["relative_error"].items()
    assert name == "encoder.layer.0.attention.self.query"
    assert f"rank 2: the change of a weight is off by {error:.1e} at most (Frobenius, {name})" in text
    assert 0.01 < error < 1


def test_inspect_an_adapter(bert, tmp_path, capsys):
    model = ipca.apply_pc(BertModel.from_pretrained(bert), rank=4, alpha=2, modules_to_save=["pooler"], progress=False)
    ipca.save_adapter(model, tmp_path / "adapter", base_model="some/base")
    assert main(["inspect", str(tmp_path / "adapter"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["kind"], record["base"], record["modules_to_save"]) == ("ipca", "some/base", ["pooler"])
    layer = next(row for row in record["layers"] if row["layer"].endswith("intermediate.dense"))
    wanted = {"shape": [48, 32], "rank": 4, "scaling": 0.5, "window": [14, 18], "form": "intact", "trainable": 320}
    assert {name: layer[name] for name in wanted} == wanted
    assert layer["certified"] is True
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert record["totals"] == {"layers": 6, "trainable": 1664 + 1056, "uncertified": [], "file_bytes": size}
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    text = capsys.readouterr().out
    assert "[14, 18)" in text
    assert "fully trained: pooler" in text
    assert f"6 layers, 2,720 parameters train, 6 windows certified; file {size / 1024:.1f} KiB; base: some/base" in text


def test_inspect_says_which_windows_are_not_certified(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Linear(12, 12))
    torch.nn.init.eye_(model[0].weight)
    ipca.save_adapter(ipca.apply_pc(model, rank=2, progress=False), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "not certified: 0: the window's edge at index 5 cuts a tie" in text
    assert "0 windows certified" in text


def test_inspect_a_stock_lora(bert, tmp_path, capsys):
    config = LoraConfig(r=5, lora_alpha=10, target_modules=["query"])
    get_peft_model(BertModel.from_pretrained(bert), config).save_pretrained(tmp_path / "stock")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "stock"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["kind"], record["base"]) == ("stock LoRA", str(bert))
    (row,) = record["layers"]
    assert (row["shape"], row["rank"], row["scaling"], row["trainable"]) == ([32, 32], 5, 2.0, 320)
    assert main(["inspect", str(tmp_path / "stock")]) == 0
    assert "a stock LoRA, without windows; ipca convert looks for them" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "original", "truncated"))
    assert main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script[:-1]}


def test_bash_takes_the_script_and_completes_paths(tmp_path, capsys):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "_shtab_ipca_inspect_pos_0_COMPGEN=_shtab_compgen_files\n" in script
    ask = 'COMP_WORDS=(ipca exp); COMP_CWORD=1; _shtab_ipca; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["export"], done.stderr


def test_without_shtab_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "made by shtab; run: pip install 'ipca-lora[hf]'" in capsys.readouterr().err


def test_quiet_prints_nothing_but_the_record(bert, tmp_path, capfd):
    for command in (["inspect", str(bert)], ["init", str(bert), "-o", str(tmp_path / "out")]):
        assert main([*command, "--rank", "4", "--quiet"]) == 0
        found = capfd.readouterr()
        assert (found.out, found.err) == ("", "")
    assert main(["inspect", str(bert), "--rank", "4", "--quiet", "--json"]) == 0
    found = capfd.readouterr()
    assert len(json.loads(found.out)["layers"]) == 7
    assert found.err == ""


def test_progress_goes_to_stderr_and_the_record_alone_to_stdout(bert, tmp_path, capfd):
    adapter = str(tmp_path / "adapter")
    commands = {
        "Spectra": ["inspect", str(bert), "--rank", "4"],
        "Window SVD": ["init", str(bert), "--rank", "4", "-o", adapter],
        "Windows": ["convert", str(bert), adapter, "-o", str(tmp_path / "converted")],
        "": ["merge", str(bert), adapter, "-o", str(tmp_path / "merged")],
    }
    for bar, command in commands.items():
        assert main([*command, "--json"]) == 0
        found = capfd.readouterr()
        assert isinstance(json.loads(found.out), dict)
        assert bar in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{adapter}", "--rank", "4", "--plot", "x.png"], "are chosen; leave out --rank, --plot"),
        (["inspect", "{out}"], "no config.json"),
        (["convert", "{bert}", "{bert}", "-o", "{out}"], "has no adapter_config.json: it is no PEFT adapter"),
        (["convert", "{bert}", "{adapter}", "-o", "{bert}"], "is the model itself, which would then load with"),
        (["export", "{bert}", "{adapter}", "-o", "{bert}"], "is the model itself, which would then load with"),
        (["convert", "{bert}", "{adapter}", "-o", "{adapter}"], "is the adapter itself; choose another folder"),
        (["convert", "{bert}", "{adapter}", "-o", "{bert}/../adapter"], "is the adapter itself; choose another folder"),
        (["export", "{bert}", "{adapter}", "-o", "{adapter}"], "is the adapter itself; choose another folder"),
        (["export", "{bert}", "{adapter}", "-o", "{bert}/config.json/x"], "is not a folder"),
        (["init", "{bert}", "--rank", "33", "-o", "{out}"], "there are only 32"),
        (["init", "{bert}", "--window", "start=30", "-o", "{out}"], "ends at 46"),
        (["init", "{bert}", "--targets", "nowhere", "-o", "{out}"], "no module matches the target 'nowhere'"),
        (["init", "{out}/none", "-o", "{out}"], "no config.json"),
        (["init", "{bert}", "-o", "{bert}/config.json"], "is not a folder"),
        (["merge", "{bert}", "{bert}", "-o", "{out}"], "no adapter_model.safetensors"),
        (["merge", "{bert}", "{bert}", "-o", "{bert}"], "is not empty"),
        (["demo", "--text", "{out}/none.tar.gz", "-o", "{out}"], "pip download"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(bert, tmp_path, capfd, arguments, message):
    names = {"bert": bert, "out": tmp_path / "out", "adapter": tmp_path / "adapter"}
    model = ipca.apply_pc(BertModel.from_pretrained(bert), rank=3, progress=False)
    ipca.save_adapter(model, tmp_path / "adapter")
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
    with pytest.raises(ValueError, match="there are only 32"):
        main(["init", str(bert), "--rank", "33", "--debug", "-o", str(tmp_path / "out")])


def test_an_interrupt_is_one_line(bert, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ipca.svd.cache, "window_svd", interrupt)
    said = "ipca: interrupted; nothing was left half-written"
    assert main(["init", str(bert), "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"{said}; the same command goes on from what is finished"
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(commands, "merge", interrupt)
    assert main(["merge", str(bert), "adapter", "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.parametrize("command", ["", *COMMANDS, "cache list", "cache verify", "cache prune", "demo"])
def test_help_has_the_examples_of_its_own_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    examples = capsys.readouterr().out.partition("\nexamples:\n")[2].partition("\n\n")[0].splitlines()
    assert examples
    assert all(" ".join(["ipca", *command.split()]) in example for example in examples)


def test_every_example_is_a_command_line():
    examples = parser().epilog.partition("\n\n")[0].splitlines()[1:]
    assert len(examples) > 10
    for example in examples:
        if "--example" not in example:  # prints and ends while it is parsed
            parser().parse_args(shlex.split(example.partition("ipca ")[2].partition(" > ")[0]))


def test_python_m_ipca_runs_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "ipca", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ipca {ipca.__version__}"


@pytest.mark.parametrize("words", [["nonsense"], ["init"], ["export", "a", "b", "--rank", "0", "-o", "c"], []])
def test_wrong_usage_is_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: ipca" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["init", "--rank", "0"], "argument --rank: must be a whole number of at least 1, got '0'"),
        (["init", "--window", "midle"], "argument --window: Unknown window 'midle': use"),
        (["inspect", "--window", "1"], "argument --window: window 1 is ambiguous, an index or a fraction"),
        (["init", "--window", "auto"], "argument --window: 'auto' needs inputs of the model"),
        (["init", "--window", "1.5"], "argument --window: The fraction in window '1.5' must lie in [0, 1]"),
        (["init", "--alpha", "nan"], "argument --alpha: must be a positive number, got 'nan'"),
        (["init", "--tol", "quick"], "argument --tol: must be fast, default, exact or a number from 1e-12"),
        (["init", "--tol", "2"], "argument --tol: must be fast, default, exact or a number from 1e-12"),
        (["export", "adapter", "--format", "onnx"], "argument --format: invalid choice: 'onnx'"),
        (["export", "adapter", "--form", "truncated"], "--format truncated needs --rank"),
        (["export", "adapter", "--rank", "2"], "--rank is only for --format truncated"),
    ],
)
def test_a_wrong_value_is_status_2_before_anything_is_read(words, says, tmp_path, capsys):
    out = ["-o", str(tmp_path / "out")] * (words[0] != "inspect")
    with pytest.raises(SystemExit) as stop:
        main([words[0], str(tmp_path / "none"), *words[1:], *out])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"ipca {words[0]}: error: ")
    assert says in error


def test_an_error_nobody_expected_is_one_line_with_its_type(bert, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise KeyError("q_proj")

    monkeypatch.setattr("ipca.cli.commands.load_model", fail)
    assert main(["inspect", str(bert)]) == 1
    assert capsys.readouterr().err == "ipca: error: KeyError: 'q_proj' (--debug shows where)\n"
    with pytest.raises(KeyError):
        main(["inspect", str(bert), "--debug"])


def test_a_reader_that_has_ended_is_no_error_message(bert):
    command = [sys.executable, "-m", "ipca", "completion", "bash", "--json"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_terminal_without_greek_letters_is_no_error(bert):
    command = [sys.executable, "-m", "ipca", "inspect", str(bert), "--rank", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "\\u03c3 max" in done.stdout
