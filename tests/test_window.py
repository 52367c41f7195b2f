import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from ipca import Window
from ipca.window import as_window

RELATIVE = {
    "principal": (Window.principal(4), lambda room: 0),
    "middle": (Window.middle(4), lambda room: room // 2),
    "minor": (Window.minor(4), lambda room: room),
    "0.33": (Window.at(0.33, 4), lambda room: 33 * room // 100),
    "0.0": (Window.at(0, 4), lambda room: 0),
    "1.0": (Window.at(1, 4), lambda room: room),
    "1e-05": (Window.at(1e-5, 4), lambda room: room // 100_000),
}


def falling_spectrum(d):
    return np.sort(np.random.default_rng(d).lognormal(size=d))[::-1].copy()


def numpy_energy_start(S, quantile):
    shares = np.cumsum(S**2) / np.sum(S**2)
    return next(k for k in range(len(S) + 1) if (shares[k - 1] if k else 0.0) >= quantile)


def numpy_effective_rank(S):
    p = S[S > 0] / S.sum()
    return int(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("d", [4, 5, 7, 48, 101, 768, 4096])
@pytest.mark.parametrize("text", RELATIVE)
def test_a_rule_resolves_against_the_layer(text, d):
    window, start = RELATIVE[text]
    resolved = window.resolve(d)
    assert resolved == Window(start(d - 4), 4)
    assert resolved.index == start(d - 4)
    assert Window(text, 4) == window
    assert not window.needs_spectrum


@pytest.mark.parametrize("d", [1, 2, 9])
@pytest.mark.parametrize("rule", ["principal", "middle", "minor", "0.5", "erank", "energy=0.5", 0])
def test_a_window_of_full_rank_starts_at_zero(rule, d):
    assert Window(rule, d).resolve(d, torch.ones(d)) == Window(0, d)


@pytest.mark.parametrize(("d", "rank", "start"), [(8, 3, 2), (9, 3, 3), (8, 4, 2), (9, 4, 2), (7, 7, 0), (10, 1, 4)])
def test_middle_rounds_down_where_d_minus_rank_is_odd(d, rank, start):
    assert Window.middle(rank).resolve(d).index == start


@pytest.mark.parametrize("steps", range(101))
def test_a_decimal_fraction_lands_on_the_index_it_names(steps):
    assert Window.at(steps / 100, 1).resolve(101).index == steps
    assert Window(f"{steps / 100}", 1).resolve(101).index == steps


@pytest.mark.parametrize("start", [0, 3, 12])
def test_an_index_stays_where_it_is(start):
    window = Window(start, 4)
    assert window == Window(f"start={start}", 4)
    assert window.index == start
    assert window.resolve(16) == window
    assert window.resolve(4096) == window


@pytest.mark.parametrize(
    "window",
    [
        Window.principal(3),
        Window.middle(3),
        Window.minor(3),
        Window.at(1 / 3, 3),
        Window.at(0.1 + 0.2, 3),
        Window(0, 3),
        Window(256, 3),
        Window.energy(0.9, 3),
        Window.energy(1, 3),
        Window.effective_rank(3),
    ],
)
def test_every_window_survives_its_text_and_a_copy(window):
    assert Window(window.text, 3) == window
    assert hash(Window(window.text, 3)) == hash(window)
    assert Window(f"  {window.text.upper()} ", 3) == window
    assert pickle.loads(pickle.dumps(window)) == window
    assert copy.deepcopy(window) == window


def test_windows_differ_by_rule_and_by_rank():
    windows = [Window(rule, 3) for rule in (0, 5, "principal", "middle", "minor", "0.25", "energy=0.25", "erank")]
    assert len({*windows, Window(0, 4)}) == len(windows) + 1


def test_a_window_is_frozen():
    window = Window(5, 3)
    with pytest.raises(AttributeError, match="start"):
        window.start = 6
    assert window == Window(5, 3)


@pytest.mark.parametrize("d", [3, 17, 64, 129])
@pytest.mark.parametrize("quantile", [0, 0.1, 0.5, 0.9, 0.99])
def test_energy_starts_after_the_components_that_hold_the_quantile(d, quantile):
    S = falling_spectrum(d)
    want = min(numpy_energy_start(S, quantile), d - 2)
    assert Window.energy(quantile, 2).resolve(d, torch.from_numpy(S)) == Window(want, 2)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("d", [4, 12, 100, 400])
def test_energy_is_exact_on_a_flat_spectrum(d, quantile):
    assert Window.energy(quantile, 1).resolve(d, torch.ones(d)).index == quantile * d


@pytest.mark.parametrize("k", range(1, 10))
def test_energy_does_not_trip_over_rounding(k):
    assert Window.energy(k / 10, 1).resolve(10, torch.full((10,), 0.1, dtype=torch.float64)).index == k


def test_all_the_energy_ends_with_the_last_nonzero_component():
    S = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    assert Window.energy(1, 1).resolve(6, S).index == 3
    assert Window.energy(1, 5).resolve(6, S).index == 1


@pytest.mark.parametrize("d", [3, 17, 64, 129])
def test_erank_starts_at_the_exponential_of_the_entropy(d):
    S = falling_spectrum(d)
    want = min(numpy_effective_rank(S), d - 2)
    assert Window.effective_rank(2).resolve(d, torch.from_numpy(S)) == Window(want, 2)


def test_erank_takes_zero_singular_values():
    S = falling_spectrum(40)
    S[25:] = 0
    assert Window.effective_rank(2).resolve(40, torch.from_numpy(S)).index == numpy_effective_rank(S)


@pytest.mark.parametrize("rule", ["erank", "energy=0.9"])
def test_a_spectral_rule_ignores_the_scale_and_the_dtype(rule):
    S = torch.from_numpy(falling_spectrum(50))
    want = Window(rule, 3).resolve(50, S)
    assert Window(rule, 3).resolve(50, S * 1e-30) == want
    assert Window(rule, 3).resolve(50, S * 1e18) == want
    assert Window(rule, 3).resolve(50, S.float()) == want


@pytest.mark.parametrize("rule", ["erank", "energy=0.9", "energy=1"])
def test_a_spectral_rule_starts_at_zero_on_a_zero_weight(rule):
    assert Window(rule, 3).resolve(8, torch.zeros(8)) == Window(0, 3)


def test_only_spectral_rules_need_the_spectrum():
    assert Window.energy(0.9, 3).needs_spectrum
    assert Window.effective_rank(3).needs_spectrum
    assert not any(Window(rule, 3).needs_spectrum for rule in ("principal", "middle", "minor", "0.5", 7))
    assert not Window.energy(0.9, 3).resolve(9, torch.ones(9)).needs_spectrum


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one(rank):
    with pytest.raises(ValueError, match=rf"rank must be at least 1, got {rank}\."):
        Window("middle", rank)


@pytest.mark.parametrize("rank", [True, 4.0, "4", None])
def test_rank_of_a_wrong_type(rank):
    with pytest.raises(TypeError, match=rf"rank must be an int, got {rank!r}\."):
        Window("middle", rank)


@pytest.mark.parametrize("start", [True, False, None, [3], 3j])
def test_start_of_a_wrong_type(start):
    with pytest.raises(TypeError) as error:
        Window(start, 4)
    assert repr(start) in str(error.value)
    assert '"start=256"' in str(error.value)


@pytest.mark.parametrize("start", [-1, -256])
def test_a_negative_start(start):
    for attempt in (lambda: Window(start, 4), lambda: as_window(start, 4), lambda: as_window(str(start), 4)):
        with pytest.raises(ValueError, match=f"cannot start at {start}: indices count from 0"):
            attempt()


@pytest.mark.parametrize(
    "text", ["", "=", "center", "start=", "start=1.5", "start=x", "energy=", "energy=x", "rank=4", "a=b=0.5", "erank=4"]
)
def test_text_of_no_known_form_shows_the_forms(text):
    with pytest.raises(ValueError, match="Unknown window") as error:
        Window(text, 4)
    assert repr(text) in str(error.value)
    assert all(form in str(error.value) for form in ("middle", '"0.33"', '"start=256"', '"energy=0.9"', '"erank"'))


@pytest.mark.parametrize("start", ["256.0", "1.5", "-0.5", "nan", "inf", 1.5, -0.5, float("nan")])
def test_a_fraction_out_of_range(start):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]") as error:
        as_window(start, 4)
    assert repr(str(start)) in str(error.value)


@pytest.mark.parametrize("number", ["256", "1", "0", 256, 1, 0, np.int64(7)])
def test_a_whole_number_is_ambiguous_and_the_message_says_how_to_write_it(number):
    with pytest.raises(ValueError, match=rf"ambiguous.* write 'start={number}' for the index") as error:
        as_window(number, 4)
    assert (f"'{number}.0' for the fraction" in str(error.value)) == (int(number) in (0, 1))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0, 256.0])
def test_a_float_is_no_start_of_a_window(fraction):
    with pytest.raises(TypeError, match=rf"for a fraction write Window\.at\({fraction}, rank\)"):
        Window(fraction, 4)


@pytest.mark.parametrize("fraction", [None, "0.5", True, [0.5]])
def test_a_fraction_must_be_a_number(fraction):
    with pytest.raises(TypeError, match=r"a window's fraction must be a number in \[0, 1\]"):
        Window.at(fraction, 4)


@pytest.mark.parametrize("window", [None, True, [0.5], b"middle"])
def test_what_is_no_window_is_refused(window):
    with pytest.raises(TypeError, match=r"a window is .* or an ipca\.Window; got "):
        as_window(window, 4)


@pytest.mark.parametrize("quantile", [1.5, -0.1, float("nan")])
def test_an_energy_out_of_range(quantile):
    with pytest.raises(ValueError, match=rf"'energy={quantile}' must lie in \[0, 1\]"):
        Window.energy(quantile, 4)


@pytest.mark.parametrize("rule", ["middle", "erank", 0, 5])
def test_a_rank_above_d_says_how_many_there_are(rule):
    window = Window(rule, 9)
    with pytest.raises(ValueError, match=r"of rank 9 needs 9 singular values, but there are only 8; lower the rank"):
        window.resolve(8, torch.ones(8))
    assert window == Window(rule, 9)


def test_a_window_past_the_end_says_where_it_ends():
    window = Window(40, 16)
    with pytest.raises(ValueError, match="ends at 56, but there are only 48 singular values") as error:
        window.resolve(48)
    assert "window 'start=40' of rank 16 ends" in str(error.value)
    with pytest.raises(ValueError, match="ends at 56, but there are only 55"):
        window.resolve(55)
    assert window.resolve(56) == window


def test_an_unresolved_window_has_no_index():
    with pytest.raises(ValueError, match=r"'middle', rank=3\) has no index before resolve"):
        _ = Window.middle(3).index


@pytest.mark.parametrize("start", ["middle", "0.25", "energy=0.9", "start=12"])
def test_as_window_reads_what_users_write(start):
    assert as_window(start, 7) == Window(start, 7)
    assert as_window(start, None) == Window(start, 16)
    assert as_window(start, None, default_rank=3) == Window(start, 3)
    assert as_window(Window(start, 7), None) == as_window(Window(start, 7), 7) == Window(start, 7)


def test_as_window_refuses_two_ranks():
    with pytest.raises(ValueError, match=r"rank=7\) has rank 7, but rank=8 was given too; give one of them"):
        as_window(Window.middle(7), 8)


@pytest.mark.parametrize("count", [1, 3, 6, 7, 50, 199])
def test_the_effective_rank_of_a_flat_spectrum_is_its_length(count):
    S = torch.cat([torch.ones(count), torch.zeros(50)])
    assert Window.effective_rank(1).resolve(len(S), S).index == count


def test_a_negative_index_in_text_says_so():
    with pytest.raises(ValueError, match="cannot start at -1"):
        Window("start=-1", 1)


@pytest.mark.parametrize("start", [256.0, "256.0", "256"])
def test_the_cure_for_a_large_fraction_works(start):
    with pytest.raises(ValueError, match="write 'start=256'"):
        as_window(start, 4)
    assert Window("start=256", 4).start == 256


@pytest.mark.parametrize("start", [math.nan, math.inf, -0.5, 1.5])
def test_no_cure_is_offered_where_none_fits(start):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]\.$"):
        as_window(start, 4)


def test_a_spectral_window_without_a_spectrum_says_what_to_pass():
    with pytest.raises(ValueError, match="pass singular_values"):
        Window.energy(0.5, 2).resolve(5)


def test_equal_numbers_are_equal_windows():
    assert as_window(0.5, 3) == as_window("0.5", 3) == as_window(np.float32(0.5), 3)
    assert Window("0.50", 3) == Window.at(0.5, 3)
    assert Window("energy=0.90", 3) == Window.energy(0.9, 3)


@pytest.mark.parametrize("rule", ["minor", "0.33", "start=7", "energy=0.9", "erank"])
def test_a_window_of_the_inputs_is_written_with_a_prefix(rule):
    window = Window(f"inputs:{rule}", 4)
    assert (window.text, window.basis) == (f"inputs:{rule}", "inputs")
    assert window == Window(rule, 4, "inputs") == Window(f" INPUTS: {rule} ", 4) != Window(rule, 4)
    assert (window.needs_calibration, window.needs_spectrum) == (True, False)
    assert window.of_moment == Window(rule, 4)
    assert dataclasses.replace(window, rank=5) == Window(f"inputs:{rule}", 5)
    assert eval(repr(window)) == window
    with pytest.raises(ValueError, match="is found from inputs of the model"):
        window.resolve(64)


@pytest.mark.parametrize(
    ("start", "basis", "words"),
    [
        ("inputs:auto", None, "'auto' finds a window of the weight"),
        ("inputs:", None, "Unknown window ''"),
        ("inputs:inputs:minor", None, "Unknown window 'inputs:minor'"),
        ("inputs:minor", "weight", "is of the inputs, but basis='weight'"),
        ("minor", "outputs", "basis must be 'weight' or 'inputs', got 'outputs'"),
        ("inputs:1", None, "window 1 is ambiguous"),
    ],
)
def test_a_window_of_the_inputs_that_means_nothing(start, basis, words):
    with pytest.raises(ValueError, match=words):
        Window(start, 4, basis)


def test_a_window_of_the_inputs_fits_their_number():
    Window("inputs:start=36", 4).check_fits((6, 40))
    Window("inputs:energy=0.9", 4).check_fits((6, 40))
    for text, words in (("inputs:start=37", "only 40 inputs"), ("inputs:minor", "rank 7 is above its 6")):
        with pytest.raises(ValueError, match=words):
            Window(text, 4 if "start" in text else 7).check_fits((6, 40))
