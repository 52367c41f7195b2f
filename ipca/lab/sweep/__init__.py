"""Sweeps: windows, LoRA and controls at several learning rates and seeds, and a report of the result."""

from ipca.lab.sweep.driver import plan_sweep, run
from ipca.lab.sweep.plan import COMPARISONS, DEFAULT_METHODS, WINDOWS
from ipca.lab.sweep.report.export import export_report, frame
from ipca.lab.sweep.report.page import verdict, write_report
from ipca.lab.sweep.schedule import Plan
from ipca.lab.sweep.task import Task, load_task

__all__ = [
    "COMPARISONS",
    "DEFAULT_METHODS",
    "WINDOWS",
    "Plan",
    "Task",
    "export_report",
    "frame",
    "load_task",
    "plan_sweep",
    "run",
    "verdict",
    "write_report",
]
