"""Training-free attention of the field and ours in the same networks: ``python -m
benchmarks.rivals``.

``layer.py`` one attention, and attention by groups of queries; ``blocks.py``, ``clusters.py``,
``tokens.py`` the methods; ``methods.py`` their names; ``networks.py`` the real networks;
``measure.py`` one row; ``report.py`` tables; ``__main__.py`` which rows.
"""
