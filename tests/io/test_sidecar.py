"""Values in ipca.json that cannot be: refused by the file's name before the model is touched."""

import copy
import json

import pytest

import ipca
from tests.helpers.models import Plain, snapshot


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dropout", 7),
        ("dropout", None),
        ("alpha", -1),
        ("alpha", "x"),
        ("alpha", None),
        ("rank", 0),
        ("start", -1),
        ("start", 1.5),
        ("shape", [3]),
    ],
)
@pytest.mark.parametrize("form", ["residual", "intact"])
def test_sidecar_with_values_out_of_range(tmp_path, field, value, form):
    base = Plain()
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), rank=2, form=form, progress=False), tmp_path)
    record = json.loads((tmp_path / "ipca.json").read_text())
    record["layers"]["b"][field] = value
    (tmp_path / "ipca.json").write_text(json.dumps(record))
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"ipca\.json"):
        ipca.load_adapter(base, tmp_path)
    assert snapshot(base) == before


@pytest.mark.parametrize("value", [None, 3, "norm"])
def test_sidecar_with_a_wrong_list(tmp_path, value):
    base = Plain()
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), rank=2, progress=False), tmp_path)
    record = json.loads((tmp_path / "ipca.json").read_text())
    record["modules_to_save"] = value
    (tmp_path / "ipca.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"ipca\.json is damaged"):
        ipca.load_adapter(base, tmp_path)
