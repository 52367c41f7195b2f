"""docs/tour.ipynb runs from a checkout, and prints what it holds."""

from pathlib import Path

import pytest

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
pytest.importorskip("trl")
NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"


def outputs(notebook):
    return [[each["output_type"] for each in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    held = nbformat.read(NOTEBOOK, 4)
    made = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(made, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    for cell in made.cells:
        cell.outputs = [each for each in cell.get("outputs", ()) if each.get("name") != "stderr"]
    assert outputs(made) == outputs(held)
    assert "<- best within the budget" in str(made.cells)
