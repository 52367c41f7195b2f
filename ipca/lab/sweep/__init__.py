"""Sweeps: windows, LoRA and controls at several learning rates and seeds, and a report of the result."""

from ipca.lab.sweep.driver import run
from ipca.lab.sweep.plan import COMPARISONS, DEFAULT_METHODS, WINDOWS
from ipca.lab.sweep.report.page import verdict, write_report
from ipca.lab.sweep.task import Task, load_task

__all__ = ["COMPARISONS", "DEFAULT_METHODS", "WINDOWS", "Task", "load_task", "run", "verdict", "write_report"]
