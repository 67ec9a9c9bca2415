"""Which implementation runs: asked for by call or environment, and why the kernels cannot run
here."""

import subprocess
import sys

import pytest
import torch

from colt5_vision.ops import (
    backend,
    coordinate_descent,
    grouped_attention,
    route_topk,
    routed_window_attention,
    soft_topk,
    window_attention,
)

Q = torch.randn(1, 2, 12, 8)
GROUPS = torch.arange(12).view(1, 1, 2, 6)
SCORES = torch.randn(2, 12)
CALLS = {
    "soft_topk": lambda **how: soft_topk(SCORES, 3, **how),
    "coordinate_descent": lambda **how: coordinate_descent(SCORES, 3, **how),
    "route_topk": lambda **how: route_topk(SCORES, 3, **how)[0],
    "window_attention": lambda **how: window_attention(
        Q, Q, Q, grid_size=(3, 4), window_size=2, **how
    ),
    "routed_window_attention": lambda **how: routed_window_attention(
        Q, Q, Q, grid_size=(3, 4), window_size=2, routed_indices=torch.tensor([[1, 2]]), **how
    ),
    "grouped_attention": lambda **how: grouped_attention(Q, Q, Q, GROUPS, GROUPS[..., :3], **how),
}
no_gpu = pytest.mark.skipif(backend.INTERPRETED, reason="what is said where no kernel can run")


@pytest.mark.parametrize("operator", CALLS)
def test_auto_is_eager_on_the_cpu(operator):
    want = CALLS[operator](backend="eager")
    for how in ({}, {"backend": None}, {"backend": "auto"}):
        assert torch.equal(CALLS[operator](**how), want)


@no_gpu
@pytest.mark.parametrize("operator", CALLS)
def test_triton_says_why_it_cannot_run(operator):
    with pytest.raises(
        RuntimeError, match=r"backend 'triton' cannot run: needs a CUDA or ROCm device.*got cpu"
    ):
        CALLS[operator](backend="triton")


@no_gpu
@pytest.mark.parametrize("operator", CALLS)
def test_environment_decides_where_the_call_does_not(operator, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        CALLS[operator]()
    want = CALLS[operator](backend="eager")
    monkeypatch.setenv(backend.VARIABLE, "")
    assert torch.equal(CALLS[operator](), want)


@pytest.mark.parametrize("operator", CALLS)
def test_a_wrong_word_is_refused(operator, monkeypatch):
    with pytest.raises(
        ValueError, match=r"backend: expected one of \('auto', 'eager', 'triton'\), got 'cuda'"
    ):
        CALLS[operator](backend="cuda")


@pytest.mark.parametrize("operator", CALLS)
def test_a_wrong_word_in_the_environment_is_refused(operator, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "Triton")
    with pytest.raises(ValueError, match="COLT5_VISION_BACKEND: expected one of"):
        CALLS[operator]()


def test_the_predicate(monkeypatch):
    """One predicate for the choice and for the error."""
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert backend.why_not_triton(torch.zeros(1)) is None
    assert (
        backend.why_not_triton(torch.zeros(1), backend.HALVES) is None
    )  # the interpreter takes float32 everywhere
    assert "got float64" in backend.why_not_triton(torch.zeros(1, dtype=torch.float64))
    assert "got meta" in backend.why_not_triton(torch.zeros(1, device="meta"))
    assert not backend.use_triton("x", None, None)  # the interpreter must be asked for
    assert backend.use_triton("x", "triton", None)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert backend.use_triton("x", None, None) and not backend.use_triton("x", None, "no reason")
    assert not backend.use_triton("x", "eager", None)
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert "pip install triton" in backend.why_not_triton(torch.zeros(1))


def test_heads_wider_than_the_kernels(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    wide = torch.randn(1, 1, 4, 257)
    call = {"grid_size": 2, "window_size": 2}
    with pytest.raises(RuntimeError, match="head_dim up to 256, got 257"):
        window_attention(wide, wide, wide, **call, backend="triton")
    assert window_attention(wide, wide, wide, **call).shape == wide.shape
    groups = torch.arange(4).view(1, 1, 1, 4)
    with pytest.raises(RuntimeError, match="head_dim up to 256, got 257"):
        grouped_attention(wide, wide, wide, groups, groups, backend="triton")


def test_pair_bias_has_no_kernel():
    with pytest.raises(RuntimeError, match="kernels take no pair_bias"):
        routed_window_attention(
            Q,
            Q,
            Q,
            grid_size=(3, 4),
            window_size=2,
            pair_bias=lambda i, j: torch.zeros(()),
            backend="triton",
        )


@pytest.mark.parametrize("architecture", [0, 80, 90, 100, 120, 942])
def test_only_ptxas_gets_a_bound_on_registers(architecture, monkeypatch):
    monkeypatch.setattr(backend, "architecture", lambda _: architecture)
    options = backend.no_spills(torch.device("cpu"))
    assert options == ({"maxnreg": 255} if architecture in (80, 90, 100, 120) else {})


def test_works_without_triton():
    """Importing and running on the CPU touch no kernel file and no Triton."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from colt5_vision import ConditionalRoutedImageAttention
heads = dict(light_heads=2, heavy_heads=2, light_dim_head=8, heavy_dim_head=8, light_window_size=4)
for fusion in ("sum", "softmax"):
    counts = dict(num_heavy_tokens_q=8, num_heavy_tokens_kv=8)
    attention = ConditionalRoutedImageAttention(16, **counts, fusion=fusion, **heads)
    attention(torch.randn(1, 16, 6, 7)).sum().backward()
loaded = [name for name in sys.modules if name.startswith("colt5_vision")]
assert not [name for name in loaded if name.endswith(".triton")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
