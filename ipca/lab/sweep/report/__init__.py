"""A sweep's report: verdict, figures and tables, made of ``rows.csv`` and ``settings.json`` alone."""

from ipca.lab.sweep.report.page import verdict, write_report

__all__ = ["verdict", "write_report"]
