"""Pictures: what is drawn, and that a picture that fails leaves no file."""

import sys

import pytest
import torch

import ipca
from ipca import analysis
from tests.helpers.models import Plain
from tests.helpers.quantized_layers import train

matplotlib = pytest.importorskip("matplotlib")


def model():
    return train(ipca.apply_pc(Plain(), rank=3, targets=["a", "b"], progress=False))


def draw(what, path):
    if what == "spectra":
        analysis.draw_spectra(analysis.spectrum(model(), progress=False), path)
    else:
        analysis.draw_drift(analysis.drift(model()), path)


@pytest.mark.parametrize("what", ["spectra", "drift"])
def test_a_panel_for_each_kind_with_its_window_shaded(what, tmp_path, drawn):
    draw(what, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert [axis.get_title() for axis in figure.axes] == ["a  12 × 20  (1)", "b  20 × 12  (1)"]
    for axis in figure.axes:
        (shade,) = axis.patches
        assert (shade.get_x(), shade.get_width()) == (3.5, 3)
        assert len(axis.lines) == (1 if what == "spectra" else 2)


def test_drift_is_drawn_relative_to_the_change(tmp_path, drawn):
    found = analysis.drift(model())
    analysis.draw_drift(found, str(tmp_path / "drift.svg"))
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].axes[0].lines}
    assert sorted(lines) == ["rescaling", "rotation"]
    assert list(lines["rotation"]) == pytest.approx((found["a"].rotation / found["a"].norm).tolist())
    assert (tmp_path / "drift.svg").read_text().startswith("<?xml")


def test_layers_of_one_kind_share_a_panel_and_so_do_experts(tmp_path, drawn):
    S = torch.arange(9.0, 0.0, -1, dtype=torch.float64)
    names = ["layers.0.mlp.up", "layers.1.mlp.up", "layers.1.experts.down[0]", "layers.1.experts.down[1]"]
    rows = [analysis.LayerSpectrum(name, (9, 12), "float32", S, ipca.Window(2, 3), "intact") for name in names]
    analysis.draw_spectra(rows, tmp_path / "s.png")
    assert [axis.get_title() for axis in drawn[0].axes] == ["mlp.up  9 × 12  (2)", "experts.down  9 × 12  (2)"]


def test_what_has_not_changed_is_drawn_too(tmp_path):
    plain = Plain()
    analysis.draw_drift(analysis.drift(plain, plain), tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()


def test_the_state_of_matplotlib_is_left_alone(tmp_path):
    before = matplotlib.rcParams["backend"]
    draw("spectra", tmp_path / "s.png")
    assert matplotlib.rcParams["backend"] == before


@pytest.mark.parametrize("what", ["spectra", "drift"])
def test_a_failed_picture_leaves_what_was_there(what, tmp_path):
    path = tmp_path / "picture.nonsense"
    path.write_text("old")
    with pytest.raises(ValueError, match="Format 'nonsense' is not supported"):
        draw(what, path)
    assert [file.name for file in tmp_path.iterdir()] == ["picture.nonsense"]
    assert path.read_text() == "old"


def test_nothing_is_no_picture(tmp_path):
    for function, nothing in ((analysis.draw_spectra, []), (analysis.draw_drift, {})):
        with pytest.raises(ValueError, match="there is nothing to draw: no layers were given"):
            function(nothing, tmp_path / "s.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a picture needs matplotlib; run: pip install 'ipca-lora\[plot\]'"):
        draw("spectra", tmp_path / "s.png")
