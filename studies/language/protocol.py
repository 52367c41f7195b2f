"""PROTOCOL.md of the language study in code."""

from __future__ import annotations

from pathlib import Path

from studies.frontier.design import Arm, Design, Run, Wave
from studies.frontier.options import options
from studies.frontier.protocol import Protocol
from studies.language.model import NAME

MAIN = ("middle", "lora", "principal", "minor")
ARMS = {
    "middle": Arm("middle window", "0.5", 1e-3),
    "lora": Arm("plain LoRA", "lora", 3e-3),
    "principal": Arm("principal window", "0.0", 3e-4),
    "minor": Arm("minor window", "1.0", 1e-3),
    "frozen-A": Arm("middle window, A frozen", "frozen-A", 3e-3),
    "frozen-B": Arm("middle window, B frozen", "frozen-B", 3e-3),
    "0.25": Arm("window at .25", "0.25", 1e-3),
    "0.75": Arm("window at .75", "0.75", 1e-3),
    "random": Arm("window at random", "random-window", 1e-3),
    "rslora": Arm("rsLoRA", "lora", 1e-3, scaling=4.0),
    "matched-principal": Arm("principal directions, middle's σ", "matched-principal", 1e-3),
    "matched-minor": Arm("minor directions, middle's σ", "matched-minor", 1e-3),
    "middle-at-principal": Arm("middle directions, principal's σ", "matched-middle", 3e-4, reference="principal"),
    "middle-at-minor": Arm("middle directions, minor's σ", "matched-middle", 1e-3, reference="minor"),
    "lora-pulled": Arm("plain LoRA, pulled to its start", "lora", 3e-3, pull=10.0),
    "full": Arm("full fine-tuning", "full", 3e-5),
}
"""In the order of their importance."""
_HERE = Path(__file__).resolve().parent
_LENGTHS = (60, 240)


def waves(short: int, long: int, others: tuple[str, ...]) -> tuple[Wave, ...]:
    """The protocol's order: the four main arms first, then the others."""
    five, three, ten = tuple(range(5)), tuple(range(3)), tuple(range(5, 10))
    groups = [MAIN, *(others[i : i + 6] for i in range(0, len(others), 6))]
    plan = []
    for arms in groups:
        for center in (True, False):
            plan += [Wave(short, arms, five, center), Wave(long, arms, three, center)]
    for center in (True, False):
        plan += [Wave(short, MAIN, ten, center), Wave(long, MAIN, (3, 4), center)]
    return tuple(plan)


PLAN = Design(
    tasks=("german", "cpp"),
    waves=waves(*_LENGTHS, others=tuple(ARMS)[4:]),
    targets={},
    arms=ARMS,
    main=MAIN,
    families=(tuple((MAIN[0], other) for other in MAIN[1:]),),
    titles={"german": "German manual pages", "cpp": "C++ headers", "other": "other task"},
    kept=("samples", "prose", "other"),
    claims_rates=True,
)
"""Everything but the targets."""
PROTOCOL = Protocol(
    text=_HERE / "PROTOCOL.md",
    plan=PLAN,
    reference=tuple(Run(task, steps, "lora", ARMS["lora"].rate, 1000) for steps in _LENGTHS for task in PLAN.tasks),
    shares=(0.5, 0.7, 0.85),
    model=NAME,
    results=_HERE / "results",
    seconds=9.0,
    changed={"root": True},
    additions=(
        options(
            _HERE / "OPTIONS.md",
            middle="middle",
            rates={"window": 1e-3, "principal": 1e-3, "lora": 3e-3, "full": 3e-4},
            waves=((60, tuple(range(5))),),
            without=("lora-pulled", "mica", "oplora"),
        ),
    ),
)
