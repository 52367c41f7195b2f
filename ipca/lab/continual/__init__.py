"""Continual learning without old data: windows of the weights, the usual baselines, and a measure of forgetting.

::

    learner = ContinualLearner(model, "disjoint", AdapterSettings(rank=8), tasks=len(tasks))
    print(run_stream(learner, tasks))
"""

from ipca.lab.continual.learner import ContinualLearner, TaskRecord
from ipca.lab.continual.methods import METHODS
from ipca.lab.continual.stream import StreamResult, StreamTask, draw_stream, run_stream
from ipca.lab.continual.task_matrix import TaskMatrix

__all__ = [
    "METHODS",
    "ContinualLearner",
    "StreamResult",
    "StreamTask",
    "TaskMatrix",
    "TaskRecord",
    "draw_stream",
    "run_stream",
]
