"""Adapters in the programs that serve them: what each computes from a folder that ``ipca export`` wrote.

    make servers                          install them, each in an environment of its own, and run all
    python -m tests.servers [NAME …]      run those that are installed; docs/results/servers.md is made from the rows

``cases.py`` writes a small model, its adapters and the log-probabilities of the live models; ``in_vllm.py`` and its
siblings run in a server's environment, without ipca; ``servers.py`` compares.
"""
