"""A window means one thing at every entrance, or is refused at every one with the ways to write it."""

import re

import numpy as np
import pytest
from torch import nn

import ipca
from ipca import Window
from ipca.cli.arguments import parse_arguments
from ipca.lab.sweep.plan import Grid
from ipca.model import AdapterSettings
from ipca.model.targets import find_targets
from ipca.nn import LinearPC

D, RANK = 64, 4
AMBIGUOUS = "window {0} is ambiguous, an index or a fraction: write 'start={0}' for the index"
BOTH_WAYS = AMBIGUOUS + ", '{0}.0' for the fraction"
NO_WINDOW = 'a window is .*"start=256".* a fraction as a float, or an ipca.Window; got {0}'

SPELLINGS = [
    ("middle", 30),
    ("principal", 0),
    ("minor", 60),
    (0.25, 15),
    ("0.25", 15),
    (np.float32(0.25), 15),
    (0.0, 0),
    (1.0, 60),
    ("1.0", 60),
    ("start=5", 5),
    ("start=1", 1),
    (Window(5, RANK), 5),
    (Window(1, RANK), 1),
    (Window.at(0.25, RANK), 15),
    (Window.at(1, RANK), 60),
    (0, BOTH_WAYS.format(0)),
    (1, BOTH_WAYS.format(1)),
    ("1", BOTH_WAYS.format(1)),
    (np.int64(1), BOTH_WAYS.format(1)),
    (256, AMBIGUOUS.format(256)),
    ("256", AMBIGUOUS.format(256)),
    (-1, "A window cannot start at -1: indices count from 0"),
    ("-1", "A window cannot start at -1: indices count from 0"),
    (256.0, "must lie in [0, 1]. For an index write 'start=256'"),
    (1.5, "must lie in [0, 1]"),
    ("center", "Unknown window 'center'"),
    (True, NO_WINDOW.format(True)),
    (None, NO_WINDOW.format(None)),
]


def rank_beside(window):
    """A window brings its rank, a start needs one."""
    return {} if isinstance(window, Window) else {"rank": RANK}


def model():
    return nn.Sequential(nn.Linear(D, 80))


def apply_pc(window):
    return ipca.apply_pc(model(), window=window, progress=False, **rank_beside(window))[0].window.index


def apply_pc_pattern(window):
    pattern = {"0": window}
    return ipca.apply_pc(model(), rank=RANK, window_pattern=pattern, progress=False)[0].window.index


def linear_pc(window):
    return LinearPC(D, 80, window=window, **rank_beside(window)).window.index


def from_linear(window):
    return LinearPC.from_linear(model()[0], window, **rank_beside(window)).window.index


def settings(window):
    (target,) = find_targets(model(), AdapterSettings(window=window, **rank_beside(window)))
    return target.window.resolve(D).index


def in_peft(**options):
    peft = pytest.importorskip("peft")
    from ipca.peft import PCConfig

    wrapped = peft.get_peft_model(model(), PCConfig(target_modules=["0"], **options))
    return wrapped.peft_config["default"].window_of("0", RANK).resolve(D).index


def peft_config(window):
    return in_peft(window=window, **({} if isinstance(window, Window) else {"r": RANK}))


def peft_pattern(window):
    return in_peft(r=RANK, window_pattern={"0": window})


def sweep(window):
    (text,) = Grid.of([window], [1e-3], 1, (), ("same",), "middle", RANK).windows
    return Window(text, RANK).resolve(D).index


ENTRANCES = {
    "apply_pc": apply_pc,
    "apply_pc window_pattern": apply_pc_pattern,
    "LinearPC": linear_pc,
    "LinearPC.from_linear": from_linear,
    "AdapterSettings": settings,
    "PCConfig": peft_config,
    "PCConfig window_pattern": peft_pattern,
    "sweep": sweep,
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(("window", "meaning"), SPELLINGS, ids=[repr(window) for window, _ in SPELLINGS])
def test_one_meaning_at_every_entrance(window, meaning, entrance):
    if isinstance(meaning, int):
        assert ENTRANCES[entrance](window) == meaning
        return
    pattern = meaning if meaning.startswith("a window is") else re.escape(meaning)
    with pytest.raises((TypeError, ValueError), match=pattern):
        ENTRANCES[entrance](window)


COMMANDS = {
    "init": lambda window: ["init", "model", "-o", "out", "--rank", str(RANK), "--window", window],
    "sweep": lambda window: ["sweep", "task.py", "-o", "out", "--windows", window],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("window", "meaning"), [(w, m) for w, m in SPELLINGS if isinstance(w, str)])
def test_the_same_meaning_on_the_command_line(window, meaning, command, capsys):
    if isinstance(meaning, str):
        with pytest.raises(SystemExit) as error:
            parse_arguments(COMMANDS[command](window))
        assert error.value.code == 2
        assert meaning in capsys.readouterr().err
        return
    args = parse_arguments(COMMANDS[command](window))
    given = settings(args.window) if command == "init" else sweep(*args.windows)
    assert given == meaning


def test_a_pattern_does_not_drop_the_rank_of_its_window():
    with pytest.raises(ValueError, match=r"window_pattern\['0'\] is .*rank=8\), but layers train 4 components"):
        ipca.apply_pc(model(), rank=RANK, window_pattern={"0": Window(5, 8)}, progress=False)
    adapted = ipca.apply_pc(
        model(), rank=RANK, rank_pattern={"0": 8}, window_pattern={"0": Window(5, 8)}, progress=False
    )
    assert adapted[0].window == Window(5, 8)


def test_an_index_that_does_not_fit_is_refused_by_its_layer():
    for entrance in (apply_pc, linear_pc, from_linear, settings, peft_config):
        with pytest.raises(ValueError, match="ends at 260, but there are only 64"):
            entrance(Window(256, RANK))
