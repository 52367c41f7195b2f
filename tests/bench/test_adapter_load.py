"""The bench of loading adapters, on a small model."""

import pytest
import torch

from bench import adapter_load
from bench.rows import read_rows


@pytest.mark.slow
def test_it_measures_loading_beside_peft(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adapter_load, "RANK", 3)
    monkeypatch.setattr(adapter_load, "SHAPES", {"q_proj": (17, 13), "down_proj": (13, 29)})
    monkeypatch.setattr(adapter_load, "THREADS", (1,))
    options = ["--layers", "2", "--rounds", "1", "--out", str(tmp_path / "rows.csv")]
    monkeypatch.setattr("sys.argv", ["adapter_load.py", *options])
    before = torch.get_num_threads()
    try:
        assert adapter_load.main() == 0
    finally:
        torch.set_num_threads(before)
    rows = read_rows(tmp_path / "rows.csv")
    assert [row["dtype"] for row in rows] == ["bfloat16"] * 5 + ["float32"] * 5
    assert [row["op"] for row in rows[:5]] == [
        "PeftModel.from_pretrained",
        "load_adapter, intact",
        "load_adapter, residual",
        "read_adapter",
        "safetensors load_file",
    ]
    assert {(row["matrices"], row["rank"], row["rounds"]) for row in rows} == {("4", "3", "1")}
    assert all(float(row["q75_s"]) >= float(row["median_s"]) >= float(row["q25_s"]) >= 0 for row in rows)
    assert {row["ratio"] for row in rows if row["op"].startswith("Peft")} == {"1.00"}
    assert "load_adapter" in capsys.readouterr().out
