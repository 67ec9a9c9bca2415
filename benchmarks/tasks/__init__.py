"""What a network is for, with routed attention in place of its own: ``python -m benchmarks.tasks``.

``scenes.py`` pictures whose truth is known; ``scores.py`` what is asked of patch tokens;
``sampling.py`` pictures in several denoising steps; ``report.py`` the table; ``__main__.py`` which
rows.
"""
