"""Studies of how far a pretrained model moves for what it learns: runs collected in the background, and their report.

A study is a folder with PROTOCOL.md, its numbers as a ``protocol.Protocol``, and a function that loads its
``run.Material``: a model, and tasks of texts, of samples of that model, or of anything else that is a
``material.Task``. ``run.main`` collects the runs, ``page.sections`` reports them. A ``protocol.Addition`` adds arms to
a study that has rows already.
"""
