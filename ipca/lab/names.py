"""Names of controls and comparisons, for the command line, which reads them without importing torch."""

CONTROLS = ("random-window", "haar", "frozen-A", "frozen-B", "matched-principal", "matched-minor")
"""Methods that differ from the middle window in one respect, see :func:`ipca.lab.baselines.apply`."""
COMPARISONS = ("same", "sqrt-sigma", "update")
"""Ways in which a sweep chooses the rates at which methods are compared."""
