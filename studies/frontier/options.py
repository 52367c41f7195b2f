"""Arms that several studies add: options of windows, and methods that were made to forget less."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from studies.frontier.design import Arm, OptionArm, Wave
from studies.frontier.protocol import Addition


def options(
    text: Path,
    *,
    middle: str,
    rates: Mapping[str, float],
    waves: Sequence[tuple[int, tuple[int, ...]]],
    without: Collection[str] = (),
) -> Addition:
    """The addition that ``text`` describes.

    Args:
        middle: the study's arm of the middle window.
        rates: centers of the first rates: of windows ``"window"``, of those at the principal end ``"principal"``, of
            frozen factors and LoRA's kin ``"lora"``, of OFT and OSF ``"full"``.
        waves: steps and seeds.
        without: arms that the study leaves out.
    """
    window, principal, lora, full = (rates[name] for name in ("window", "principal", "lora", "full"))
    arms: dict[str, Arm] = {
        "middle-flat": OptionArm("middle window, one size", "middle", window, magnitude=1.0),
        "principal-flat": OptionArm("principal window, one size", "principal", window, magnitude=1.0),
        "minor-flat": OptionArm("minor window, one size", "minor", window, magnitude=1.0),
        "inputs-minor": OptionArm("least of the base's inputs", "inputs:minor", window, inputs="base"),
        "inputs-principal": OptionArm("most of the new inputs", "inputs:principal", window, inputs="new"),
        "inputs-minor-B": OptionArm("the same, A frozen", "inputs:minor", lora, train="B", inputs="base"),
        "principal-B": OptionArm("principal window, A frozen", "principal", principal, train="B"),
        "minor-B": OptionArm("minor window, A frozen", "minor", lora, train="B"),
        "mica": Arm("MiCA", "mica", lora),
        "oplora": Arm("OPLoRA", "oplora", lora),
        "oft": Arm("OFT", "oft", full),
        "osf": Arm("OSF", "osf", full),
        "lora-pulled": Arm("plain LoRA, pulled to its start", "lora", lora, pull=10.0),
    }
    arms = {name: arm for name, arm in arms.items() if name not in without}
    pairs = [(arm, other) for arm in arms for other in ("lora", middle)]
    pairs += [(end, "middle-flat") for end in ("principal-flat", "minor-flat")]
    runs = tuple(Wave(steps, tuple(arms), seeds, center) for steps, seeds in waves for center in (True, False))
    return Addition(text, arms, runs, (tuple(pairs),))
