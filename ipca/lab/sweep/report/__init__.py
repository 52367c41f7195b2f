"""The report of a sweep: verdict, figures and tables, from ``rows.csv`` and ``settings.json``."""
