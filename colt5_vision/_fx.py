"""Layers as single nodes of torch.fx graphs: what happens within them depends on sizes."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ._torch_internals import refuse_old_onnx_export

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def fx_leaf(forward: _Forward) -> _Forward:
    """Decorate a module's forward: whoever traces a model with ``torch.fx`` gets one node for it.

    Tracers ask themselves which modules are leaves, and none but torch's are by default.

    ONNX's exporter by TorchScript is refused here. It gives keyword-only arguments by position, and
    Python's error would not say what is wrong.
    """

    @functools.wraps(forward)
    def traced_or_run(self, *args, **kwargs):
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.fx.Proxy):
                path = x.tracer.path_of_module(self)
                return x.tracer.create_proxy("call_module", path, args, kwargs)
        refuse_old_onnx_export()
        return forward(self, *args, **kwargs)

    return traced_or_run  # type: ignore[return-value]  it has the signature of what it wraps
