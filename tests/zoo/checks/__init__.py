"""All checks, and their running one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.zoo.case import Case, NeedsError, NotApplicableError, Way
from tests.zoo.checks import command_line, in_peft, in_trainer, native
from tests.zoo.models.tiny import Architecture
from tests.zoo.rows import Row, reason
from tests.zoo.selections import SELECTIONS

Check = Callable[[Case, Way], str | None]
BOTH_FORMS: tuple[Check, ...] = (
    native.apply,
    native.start,
    native.disabled,
    native.gradients,
    native.save,
    native.load,
    native.load_other_form,
    native.merge,
    native.unload,
)
INTACT: tuple[Check, ...] = (
    native.head,
    native.training_mode,
    native.generate,
    native.statistics,
    native.export_serve,
    native.save_pretrained,
    native.unload_save,
    native.bfloat16,
)
LORA: tuple[Check, ...] = (in_peft.lora_apply, in_peft.lora_load, in_peft.lora_merge)
PEFT: tuple[Check, ...] = (
    in_peft.apply,
    in_peft.head,
    in_peft.start,
    in_peft.gradients,
    in_peft.save,
    in_peft.load,
    in_peft.load_natively,
    in_peft.load_native_folder,
    in_peft.merge,
)
COMMANDS: tuple[Check, ...] = (command_line.inspect, command_line.init, command_line.merge, command_line.residual)
TRAINER: tuple[Check, ...] = (in_trainer.resume, in_trainer.best_at_end)


def checks(selection: str) -> Iterator[tuple[str, Check]]:
    """Names and functions of the checks of a selection of layers; each takes the case and the way named first."""
    native_way, peft_way = Way(selection, "intact"), Way(selection, "peft")
    groups = {
        "lora": (LORA, peft_way),
        "intact": (BOTH_FORMS + INTACT * (selection == "linear"), native_way),
        "residual": ((*BOTH_FORMS, native.export_residual), Way(selection, "residual")),
        "peft": (PEFT, peft_way),
        "cli": (COMMANDS, native_way),
        "trainer": (TRAINER * (selection != "named"), native_way),
        "trainer_peft": (TRAINER * (selection != "named"), peft_way),
    }
    for group, (functions, way) in groups.items():
        for function in functions:
            name = function.__name__.removeprefix(f"{group}_")
            yield f"{selection}.{group}.{name}", partial(function, way=way)


def rows(name: str, architecture: Architecture, folder: Path) -> Iterator[Row | str]:
    """The name of each check before it runs, then its row."""
    case = Case(name, architecture, folder)
    for selection in SELECTIONS:
        for check, function in checks(selection):
            yield check
            row = attempt(case, check, function)
            if (row.outcome, check) == ("none", f"{selection}.lora.apply"):
                break
            yield row


def attempt(case: Case, check: str, function: Callable[[Case], str | None]) -> Row:
    """Run one check."""
    try:
        return Row(case.name, check, "ok", function(case) or "")
    except NeedsError as error:
        return Row(case.name, check, "needs", str(error))
    except NotApplicableError as error:
        return Row(case.name, check, "none", str(error))
    except AssertionError as error:
        return Row(case.name, check, "wrong", reason(error).removeprefix("AssertionError: "))
    except Exception as error:
        return Row(case.name, check, "error", reason(error))
