"""Names of a sweep's methods, comparisons, examples and formats, for the command line: without importing torch."""

CONTROLS = ("random-window", "haar", "frozen-A", "frozen-B", "matched-principal", "matched-minor")
"""Methods that differ from the middle window in one respect, see :func:`ipca.lab.baselines.apply`."""
BASELINES = ("mica", "kasa", "osf", "oft", "corda-ipm", "corda-kpm", "oplora", "lora-null")
"""Methods of other papers, see :func:`ipca.lab.baselines.apply`."""
COMPARISONS = ("same", "sqrt-sigma", "update")
"""Ways in which a sweep chooses the rates at which methods are compared."""
TASK_EXAMPLES = ("lm", "classification", "images")
"""Examples of tasks of a sweep, in the folder of that package."""
PICTURES = ("png", "svg", "pdf")
"""Formats of figures."""
