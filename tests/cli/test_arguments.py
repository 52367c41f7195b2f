"""Values of command-line options; the rest of them are tested with their commands."""

import argparse

import pytest

from ipca.cli.arguments import byte_count, positive_int, positive_number, seconds, svd_tolerance, window_start


def test_sizes_and_ages():
    assert [byte_count(text) for text in ("0", "12", "1k", "1.5M", "10G", "2T")] == [
        0,
        12,
        1024,
        3 * 2**19,
        10 * 2**30,
        2**41,
    ]
    assert [seconds(text) for text in ("30s", "2m", "1.5h", "30d")] == [30, 120, 5400, 30 * 86400]
    for text in ("", "x", "10 gigabytes", "-1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number with one of the units K, M, G, T"):
            byte_count(text)
    with pytest.raises(argparse.ArgumentTypeError, match="'30' is not a number with one of the units s, m, h, d"):
        seconds("30")


def test_numbers_and_windows():
    assert (positive_int("12"), positive_number("5e-4")) == (12, 5e-4)
    assert [svd_tolerance(text) for text in ("fast", "exact", "1e-7")] == ["fast", "exact", 1e-7]
    assert [window_start(text) for text in ("Middle", "0.50", "start=256", "erank")] == [
        "middle",
        "0.5",
        "start=256",
        "erank",
    ]
