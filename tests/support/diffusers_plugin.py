"""A pytest plugin for the processes that run diffusers' own tests: it routes every model that they
construct.

It is loaded as a top-level module, for ``tests`` is diffusers' own there.
"""

import functools
import json
import os
from pathlib import Path

from diffusers import ModelMixin

from colt5_vision import RoutedAttentionConfig, route_attention
from colt5_vision.swap.sampled import SampledAttention

CONFIG = RoutedAttentionConfig(window_size=4, num_heavy_tokens_kv=1.0, min_tokens=1)
"""All tokens routed: what stock attention computes, up to rounding."""

_results: dict[str, dict] = {}
_calls = 0
_depth = 0


def pytest_configure(config):
    if os.environ.get("COLT5_ROUTED"):
        route_every_model()


def route_every_model() -> None:
    """From now on a diffusers model, not one within another nor an autoencoder, is routed as soon
    as it is made."""
    forward = SampledAttention.forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        global _calls
        _calls += 1
        return forward(self, *args, **kwargs)

    SampledAttention.forward = counted
    ModelMixin.__init_subclass__ = classmethod(
        lambda cls, **kwargs: _route_when_made(cls)
    )  # diffusers imports lazily
    known = ModelMixin.__subclasses__()
    while known:
        known += (cls := known.pop()).__subclasses__()
        _route_when_made(cls)


def _route_when_made(cls: type) -> None:
    init = vars(cls).get("__init__")
    if init is None or hasattr(init, "routes"):
        return

    @functools.wraps(init)
    def made(self, *args, **kwargs):
        global _depth
        _depth += 1
        try:
            init(self, *args, **kwargs)
        finally:
            _depth -= 1
        if _depth == 0 and ".autoencoders." not in type(self).__module__:
            try:
                route_attention(self, CONFIG)
            except ValueError as error:
                if "has no attention" not in str(error):
                    raise

    made.routes = True
    cls.__init__ = made


def pytest_runtest_logreport(report):
    global _calls
    result = _results.setdefault(report.nodeid, {"outcome": "passed", "routed_calls": 0, "why": ""})
    result["routed_calls"] += _calls
    _calls = 0
    skipped = report.outcome == "skipped" and result["outcome"] == "passed"
    if report.outcome == "failed" or skipped:
        result |= {
            "outcome": report.outcome,
            "why": report.longreprtext.strip().rpartition("\n")[2],
        }


def pytest_sessionfinish(session):
    if "COLT5_REPORT" in os.environ:
        Path(os.environ["COLT5_REPORT"]).write_text(json.dumps(_results))
