"""Sweeps: every window beside its neighbors, at several rates and seeds, and a report that says what was found."""

from ipca.lab.sweep.driver import run
from ipca.lab.sweep.plan import COMPARISONS, DEFAULT_METHODS, WINDOWS
from ipca.lab.sweep.report import verdict, write_report
from ipca.lab.sweep.task import Task, load_task

__all__ = ["COMPARISONS", "DEFAULT_METHODS", "WINDOWS", "Task", "load_task", "run", "verdict", "write_report"]
