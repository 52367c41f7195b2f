"""The bench of reading adapters, on a small model."""

import pytest

from bench import adapter_load
from bench.rows import read_rows


@pytest.mark.slow
def test_it_measures_saving_reading_and_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adapter_load, "LAYERS", 2)
    monkeypatch.setattr(adapter_load, "RANK", 3)
    monkeypatch.setattr(adapter_load, "SHAPES", {"q_proj": (17, 13), "down_proj": (13, 29)})
    monkeypatch.setattr("sys.argv", ["adapter_load.py", "--runs", "1", "--out", str(tmp_path / "rows.csv")])
    assert adapter_load.main() == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert [row["op"].split(",")[0] for row in rows] == [
        "save_adapter",
        "safetensors load_file",
        "read_adapter",
        "load_adapter",
        "load_adapter",
    ]
    assert {(row["layers"], row["rank"], row["runs"]) for row in rows} == {("4", "3", "1")}
    assert all(float(row["median_s"]) >= float(row["best_s"]) >= 0 for row in rows)
    assert "read_adapter" in capsys.readouterr().out
