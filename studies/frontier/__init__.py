"""Studies of how far a language model moves for what it learns: runs collected in the background, and their report.

A study is a folder with PROTOCOL.md, its numbers as a ``protocol.Protocol``, and a function that loads its
``run.Material``: a model, and tasks made of texts and of samples of that model. ``run.main`` collects the runs,
``page.sections`` reports them. A ``protocol.Addition`` adds arms to a study that has rows already.
"""
