"""The library on a CPU beside its peers, speed and memory: ``python -m benchmarks.cpu``.

``cases.py`` what a row of calls is; ``gates.py``, ``selection.py``, ``attention.py``, ``layers.py``
the rows; ``peers.py`` peers that no package has; ``memory.py`` one call in a process of its own;
``timing.py`` rounds of calls taking turns; ``report.py``, ``plots.py`` tables and pictures;
``__main__.py`` sizes and the time that each row has.

In place of the rows: ``profile.py`` where the time of a call goes; ``fit.py`` constants of the cost
model; ``targets.py`` what is to be reached.
"""
