"""The library on a GPU beside its peers, correctness first: ``python -m benchmarks.gpu``.

``measure.py`` how to time; ``correctness.py``, ``attention.py``, ``routing.py`` the steps, each a
function of (device, sizes, timer) that yields records; ``sweep.py`` launch configurations;
``report.py`` targets, tables; ``__main__.py`` runs every step in a process of its own, within its
time.
"""
