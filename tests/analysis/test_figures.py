"""Figures: what is drawn, where it is written, and that a drawing that fails leaves what was there."""

import itertools
import sys

import pytest
import torch

import ipca
from ipca import analysis
from ipca.analysis.figures import COLORS, dark_to_light, picture
from ipca.analysis.importance import BlockImportance
from ipca.analysis.spectra import LayerSpectrum
from ipca.model.calibration import LayerSensitivity
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
    rows = [LayerSpectrum(name, (9, 12), "float32", S, ipca.Window(2, 3), "intact") for name in names]
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


def test_sensitivities_are_drawn_with_both_windows_shaded(tmp_path, drawn):
    found = analysis.sensitivity(Plain(), [torch.randn(40, 20)], targets=["a", "b"], progress=False)
    analysis.draw_sensitivity(found, tmp_path / "sensitivity.png", rank=3)
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in drawn[0].axes] == ["a  12 × 20  (1)", "b  20 × 12  (1)"]
    for axis, layer in zip(drawn[0].axes, found.values(), strict=True):
        assert axis.get_yscale() == "log"
        assert [patch.get_x() + 0.5 for patch in axis.patches] == [layer.quietest(3).index, 4]
        relative = layer.sensitivity / layer.sensitivity.mean()
        assert axis.lines[0].get_ydata().tolist() == pytest.approx(relative.tolist())


def test_a_window_that_does_not_fit_is_refused_before_a_file_is_written(tmp_path):
    found = {"a": LayerSensitivity((5, 7), torch.ones(5), torch.ones(5))}
    with pytest.raises(ValueError, match="needs 16 singular values, but there are only 5"):
        analysis.draw_sensitivity(found, tmp_path / "picture.png")
    assert not any(tmp_path.iterdir())


def test_importance_is_drawn_as_layers_by_blocks(tmp_path, drawn):
    edges, nan = (0, 2, 4, 6), torch.nan
    changes = {"first": [3.0, 0.5, nan], "second": [-1.0, torch.inf, 0.0]}
    found = {k: BlockImportance((6, 8), edges, 1.0, torch.tensor(v).double()) for k, v in changes.items()}
    analysis.draw_importance(found, tmp_path / "importance.svg")
    axis = drawn[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"]
    shown = axis.images[0].get_array()
    assert shown.filled(-9).tolist() == [[3.0, 0.5, -9], [-1.0, -9, 0.0]]


def test_nothing_to_draw_is_refused(tmp_path):
    for draw in (analysis.draw_importance, analysis.draw_sensitivity):
        with pytest.raises(ValueError, match="there is nothing to draw"):
            draw({}, tmp_path / "picture.png")


def test_the_ending_names_the_format_and_the_size_is_in_inches(tmp_path):
    with picture(tmp_path / "made" / "a.b.png", (3, 2)) as figure:
        figure.subplots().plot([1, 2])
    with picture(str(tmp_path / "a.svg")) as figure:
        figure.subplots().plot([1, 2])
    pixels = (tmp_path / "made" / "a.b.png").read_bytes()[16:24]
    assert [int.from_bytes(pixels[:4], "big"), int.from_bytes(pixels[4:], "big")] == [450, 300]
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.b.png", "a.svg", "made"]


@pytest.mark.parametrize("path", ["picture", "", "made/..", ".png"])
def test_a_path_without_an_ending_is_refused(path, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=f"'{path}' has no file extension; use .png, .pdf or .svg"), picture(path):
        pass
    assert [found.name for found in tmp_path.rglob("*")] == ["here"]


def test_a_drawing_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(KeyError), picture(path):
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_pyplot_is_not_imported_and_the_backend_stays(tmp_path, monkeypatch):
    before = matplotlib.rcParams["backend"]
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with picture(tmp_path / "a.png") as figure:
        figure.subplots().plot([1, 2])
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.rcParams["backend"] == before


def test_an_empty_figure_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with (
        pytest.raises(ImportError, match=r"a picture needs matplotlib; run: pip install 'ipca-lora\[plot\]'"),
        picture(tmp_path / "a.png"),
    ):
        pass


def lightness(color):
    """Relative luminance, 0 to 1: what is left of a color in gray."""
    return sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), matplotlib.colors.to_rgb(color), strict=True))


def test_the_colormap_only_gets_lighter():
    found = [lightness(matplotlib.colormaps[COLORS](k / 20)) for k in range(21)]
    assert all(b > a + 0.01 for a, b in itertools.pairwise(found))
    layers = [lightness(color) for color in dark_to_light(5)]
    assert layers == sorted(layers)
    assert layers[-1] < 0.8  # a line on white


def test_what_lies_over_another_differs_in_more_than_its_color(tmp_path, drawn):
    analysis.draw_drift(analysis.drift(model()), tmp_path / "drift.png")
    found = analysis.sensitivity(Plain(), [torch.randn(40, 20)], targets=["a"], progress=False)
    analysis.draw_sensitivity(found, tmp_path / "sensitivity.png", rank=3)
    rotation, rescaling = drawn[0].axes[0].lines
    assert rotation.get_linestyle() != rescaling.get_linestyle()
    assert [patch.get_hatch() for patch in drawn[1].axes[0].patches] == [None, "///"]


def test_the_style_is_the_same_whatever_the_users_is(tmp_path):
    def written(name):
        with picture(tmp_path / name, (3, 2)) as figure:
            figure.subplots().plot([1, 2], label="$x")
        return (tmp_path / name).read_bytes()

    plain = written("a.svg")
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):
        assert written("b.svg") == plain
        assert matplotlib.rcParams["font.size"] == 30
    assert written("a.pdf") == written("b.pdf")
