"""How the study's page writes numbers, methods and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_NAMES = {"0.0": "principal, f = 0", "0.5": "middle, f = 0.5", "1.0": "minor, f = 1"}
_NAMES |= {"lora": "plain LoRA", "full": "full fine-tuning", "auto": "auto"}


def method_name(method: str) -> str:
    """What the page calls a method: windows by their place, controls by their own name."""
    window = method[:1].isdigit()
    return _NAMES.get(method, f"f = {float(method):g}" if window else method)


def number(text: str, sign: str = "") -> str:
    """A cell with three decimals, a dash where it is empty."""
    return f"{float(text):{sign}.3f}".replace("-", "−").replace("inf", "∞") if text else "–"


def estimate(row: Mapping[str, str], sign: str = "", prefix: str = "", middle: str = "mean") -> str:
    """``0.853 [0.841, 0.862]``; without the brackets where there is no interval."""
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    brackets = f" [{number(low, sign)}, {number(high, sign)}]" if low and high else ""
    return f"{number(row[middle], sign)}{brackets}"


def effect(row: Mapping[str, str]) -> str:
    """The difference to the middle window in a row of summary.csv."""
    return estimate(row, "+", "difference_", "difference")


def percent(share: float) -> str:
    """``12 %``, without a sign where it rounds to 0."""
    return f"{round(100 * share)} %".replace("-", "−")


def p_value(text: str) -> str:
    """``0.014``, ``< 0.001``; a dash where it is empty."""
    if not text:
        return "–"
    return "< 0.001" if float(text) < 0.001 else f"{float(text):.3f}"


def result(test: Mapping[str, str]) -> str:
    """A row of tests.csv as ``+0.053 [+0.031, +0.072], adjusted p 0.014``."""
    return f"{estimate(test, '+')}, adjusted p {p_value(test['adjusted'])}"


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
