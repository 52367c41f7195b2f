"""PROTOCOL.md of the study in code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from studies.frontier.design import Arm, Design, Run, Wave
from studies.frontier.options import options
from studies.frontier.protocol import Protocol
from studies.language.protocol import PLAN as LANGUAGE
from studies.position_grid.mgm import NAME

POSITIONS = ("0.0", "0.0625", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875", "0.9375", "1.0")
MAIN = ("0.5", "lora", "0.0", "1.0")
ARMS = {
    "0.5": Arm("middle window", "0.5", 3e-3),
    "lora": Arm("plain LoRA", "lora", 1e-2),
    "0.0": Arm("principal window", "0.0", 1e-3),
    "1.0": Arm("minor window", "1.0", 3e-3),
    **{place: Arm(f"window at {place}", place, 3e-3) for place in POSITIONS if place not in MAIN},
    "frozen-A": Arm("middle window, A frozen", "frozen-A", 1e-2),
    "frozen-B": Arm("middle window, B frozen", "frozen-B", 1e-2),
    "random": Arm("window at random", "random-window", 3e-3),
    "rslora": Arm("rsLoRA", "lora", 3e-3, scaling=8**0.5),
    "full": Arm("full fine-tuning", "full", 3e-4),
}
"""In the order of their importance."""
_HERE = Path(__file__).resolve().parent
_SHORT, _LONG = 60, 240
_SEEDS = tuple(range(10))
_WINDOWS = (*MAIN, *(place for place in POSITIONS if place not in MAIN))
_OTHERS = tuple(ARMS)[len(_WINDOWS) :]
_AT_LENGTH = (*MAIN, "0.25", "0.75", "frozen-A", "frozen-B")
PLAN = Design(
    tasks=("twins", "reversed"),
    waves=tuple(
        Wave(steps, arms, _SEEDS, center)
        for steps, arms in ((_SHORT, _WINDOWS), (_SHORT, _OTHERS), (_LONG, _AT_LENGTH))
        for center in (True, False)
    ),
    targets={},
    scales=(1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0),
    finer=(1 / 32, 3 / 32, 5 / 32, 7 / 32, 5 / 16, 7 / 16, 5 / 8, 7 / 8),
    rank=8,
    batch=8,
    arms=ARMS,
    main=MAIN,
    families=(
        (
            *(("0.5", other) for other in ("lora", "rslora", "full", "random", "0.0", "1.0")),
            *((frozen, other) for frozen in ("frozen-A", "frozen-B") for other in ("lora", "0.5")),
            ("full", "lora"),
        ),
    ),
    titles={"twins": "gut communities", "reversed": "reversed sentences", "other": "other task"},
    kept=("samples", "other"),
    enough=10,
    autocast=False,
    root=True,
    itemized=_SEEDS[:1],
    claims_shape=True,
    whole_family=True,
)
"""Everything but the targets."""


def _reference(plan: Design) -> tuple[Run, ...]:
    return tuple(Run(task, steps, "lora", ARMS["lora"].rate, 1000) for steps in (_SHORT, _LONG) for task in plan.tasks)


PROTOCOL = Protocol(
    text=_HERE / "PROTOCOL.md",
    plan=PLAN,
    reference=_reference(PLAN),
    shares=(0.5, 0.7, 0.85),
    model=NAME,
    results=_HERE / "results",
    seconds=0.7,
    additions=(
        options(
            _HERE / "OPTIONS.md",
            middle="0.5",
            rates={"window": 3e-3, "principal": 3e-3, "lora": 1e-2, "full": 3e-4},
            waves=((_SHORT, _SEEDS),),
            without=("oft", "osf"),
        ),
    ),
)
_TEXT_PLAN = replace(
    PLAN,
    tasks=LANGUAGE.tasks,
    rank=LANGUAGE.rank,
    batch=LANGUAGE.batch,
    arms={**ARMS, "rslora": replace(ARMS["rslora"], scaling=LANGUAGE.rank**0.5)},
    titles=LANGUAGE.titles,
    kept=LANGUAGE.kept,
    autocast=True,
)
TEXT_MODELS = replace(PROTOCOL, plan=_TEXT_PLAN, reference=_reference(_TEXT_PLAN), seconds=9.0)
"""For another causal language model, on the tasks of the language study."""
