"""Tasks one after another, without old data: windows of the weights, the usual baselines, and what each forgets.

>>> learner = ContinualLearner(model, "disjoint", AdapterSettings(rank=8), tasks=len(tasks))
>>> result = run_stream(model, tasks, "disjoint", AdapterSettings(rank=8))
>>> print(result)
"""

from ipca.lab.continual.draw import draw_stream
from ipca.lab.continual.learner import ContinualLearner, TaskRecord
from ipca.lab.continual.methods import METHODS
from ipca.lab.continual.stream import StreamResult, StreamTask, run_stream

__all__ = ["METHODS", "ContinualLearner", "StreamResult", "StreamTask", "TaskRecord", "draw_stream", "run_stream"]
