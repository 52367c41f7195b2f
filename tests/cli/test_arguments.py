"""Values of command-line options; the rest of them are tested with their commands."""

import argparse
from pathlib import Path

import pytest

from ipca.cli.arguments import (
    PATHS,
    byte_count,
    parse_arguments,
    parser,
    positive_int,
    positive_number,
    seconds,
    svd_tolerance,
    window_start,
)


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


UNSET = {
    "-o": ["init model -o", "train model data -o", "sweep task.py -o", "report sweep -o", "demo -o", "merge m a -o"],
    "--out": ["export model adapter --out", "convert model adapter --out", "tradeoff model adapter data --out"],
    "--cache": [
        "cache list --cache",
        "cache verify --cache",
        "cache prune --max-bytes 0 --cache",
        "init m -o x --cache",
    ],
    "--original": ["convert model adapter -o out --original"],
    "--plot": ["inspect model --plot", "tradeoff model adapter data --plot"],
    "--config": ["train -o out --config"],
    "--keep": ["train model data -o out --keep", "tradeoff model adapter data --keep"],
    "--held-out": ["train model data -o out --held-out"],
    "--text": ["demo --text"],
    "MODEL": ["train", "tradeoff"],
    "MODEL_DIR": ["inspect", "init", "merge", "export", "convert", "tune"],
    "DATA": ["train model", "tradeoff model adapter"],
    "ADAPTER": ["tradeoff model"],
    "ADAPTER_DIR": ["merge model", "export model", "convert model"],
    "TASK.py": ["sweep"],
    "SWEEP": ["report", "report a"],
}


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, lines in UNSET.items() for words in lines])
@pytest.mark.parametrize("value", ["", " "])
def test_a_path_from_a_variable_that_is_not_set_is_refused(name, words, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments([*words.split(), value])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error
    assert f": got {value!r}; is a variable of the shell not set?" in error


def actions(add):
    for action in add._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
        else:
            yield action


def test_every_path_is_of_a_type_that_refuses_an_empty_one():
    held = [action for action in actions(parser()) if action.type in PATHS]
    named = {action.option_strings[0] if action.option_strings else action.metavar for action in held}
    assert named | {"--out"} == {*UNSET}
    assert not [action.dest for action in actions(parser()) if action.type is Path]
