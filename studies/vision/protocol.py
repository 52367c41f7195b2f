"""PROTOCOL.md of the vision study in code."""

from __future__ import annotations

from pathlib import Path

from studies.frontier.design import Arm, Design, Run, Wave
from studies.frontier.protocol import Protocol
from studies.vision.model import NAME

MAIN = ("middle", "lora", "principal", "minor")
ARMS = {
    "middle": Arm("middle window", "0.5", 3e-4),
    "lora": Arm("plain LoRA", "lora", 1e-3),
    "principal": Arm("principal window", "0.0", 1e-4),
    "minor": Arm("minor window", "1.0", 3e-4),
    "0.25": Arm("window at .25", "0.25", 3e-4),
    "0.75": Arm("window at .75", "0.75", 3e-4),
    "random": Arm("window at random", "random-window", 3e-4),
    "frozen-A": Arm("middle window, A frozen", "frozen-A", 1e-3),
    "frozen-B": Arm("middle window, B frozen", "frozen-B", 1e-3),
    "matched-principal": Arm("principal directions, middle's σ", "matched-principal", 3e-4),
    "matched-minor": Arm("minor directions, middle's σ", "matched-minor", 3e-4),
    "full": Arm("full fine-tuning", "full", 1e-5),
}
"""In the order of their importance."""
_HERE = Path(__file__).resolve().parent
_SHORT, _LONG = 60, 240
_FIVE, _NEXT = tuple(range(5)), tuple(range(5, 10))
_OTHERS = tuple(ARMS)[len(MAIN) :]
PLAN = Design(
    tasks=("kinds",),
    waves=tuple(
        Wave(steps, arms, seeds, center)
        for steps, arms, seeds in (
            *((_SHORT, MAIN, _FIVE), (_LONG, MAIN, _FIVE), (_SHORT, _OTHERS, _FIVE)),
            *((_SHORT, MAIN, _NEXT), (_LONG, _OTHERS, _FIVE), (_LONG, MAIN, _NEXT)),
        )
        for center in (True, False)
    ),
    targets={},
    scales=(0.125, 0.25, 0.375, 0.5, 0.75, 1.0),
    finer=(0.0625, 0.1875, 0.3125, 0.4375, 0.625, 0.875),
    batch=16,
    arms=ARMS,
    main=MAIN,
    families=(tuple((MAIN[0], other) for other in MAIN[1:]),),
    titles={"kinds": "emoji subcategories", "kl_photos": "KL(base ‖ tuned) of saliency on photographs"},
    kept=("photos", "emoji", "textiles"),
    metric="kl_photos",
    unit="an image",
    item="images",
    autocast=False,
    root=True,
    claims_rates=True,
)
"""Everything but the targets."""
PROTOCOL = Protocol(
    text=_HERE / "PROTOCOL.md",
    plan=PLAN,
    reference=tuple(Run("kinds", steps, "lora", ARMS["lora"].rate, 1000) for steps in (_SHORT, _LONG)),
    shares=(0.5, 0.7, 0.85),
    model=NAME,
    results=_HERE / "results",
    seconds=2.5,
    digits=3,
)
