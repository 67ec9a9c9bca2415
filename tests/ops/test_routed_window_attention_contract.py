"""routed_window_attention's contract: tracing, memory, bad input."""

import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from colt5_vision.ops import routed_window_attention, window_attention
from tests.support.attention_cases import (
    assert_same,
    distinct,
    leaves,
    operator,
    out_and_grads,
    randn,
)

eager = sys.modules["colt5_vision.ops.routed_window_attention.eager"]
INF, NAN = float("inf"), float("nan")


class Layer(torch.nn.Module):
    def forward(self, q, k, v, weights, routed, mask, queries):
        call = {"grid_size": (4, q.shape[2] // 4), "window_size": 3, "key_mask": mask}
        first = routed_window_attention(q, k, v, routed_indices=routed, log_weights=weights, **call)
        return routed_window_attention(
            first, k, v, routed_indices=routed, query_indices=queries, **call
        )


def layer_inputs(batch, width, num_routed, num_queries):
    inputs = [*leaves(batch, 4, 4 * width, 8), randn(batch, 2, num_routed, seed=5).requires_grad_()]
    rest = (distinct((batch, 2), num_routed, 4 * width), randn(batch, 4 * width, seed=6) > -1)
    return inputs, (*rest, distinct((batch,), num_queries, 4 * width, seed=7))


def test_compile():
    inputs, rest = layer_inputs(2, 5, 6, 3)
    compiled = torch.compile(Layer(), fullgraph=True)
    assert_same(
        *(out_and_grads(lambda *x, f=f: f(*x, *rest), inputs) for f in (compiled, Layer())), 1e-12
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_dynamic_sizes(dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Layer(), backend=counter, fullgraph=True, dynamic=dynamic)
    for sizes in ((2, 5, 6, 3), (3, 6, 5, 4), (4, 9, 8, 7)):
        inputs, rest = layer_inputs(*sizes)
        assert_same(
            *(
                out_and_grads(lambda *x, f=f, r=rest: f(*x, *r), inputs)
                for f in (compiled, Layer())
            ),
            1e-12,
        )
    assert counter.frame_count <= 2


def test_export():
    example = [x.detach() for group in layer_inputs(2, 5, 6, 3) for x in group]
    program = torch.export.export(Layer(), tuple(example)).module()
    torch.testing.assert_close(program(*example), Layer()(*example))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("own", [0, 1])
def test_opcheck(dtype, bare, own):
    q, k, v = leaves(2, 4, 22, 8, dtype=dtype)
    routed, mask, queries = (
        distinct((2, 2), 3, 20),
        randn(2, 22, seed=5) > -1,
        distinct((2,), 5, 20),
    )
    rest = (
        (None, None, None)
        if bare
        else (randn(2, 2, 3, dtype=dtype).requires_grad_(), mask, queries)
    )
    op = torch.ops.colt5_vision.routed_window_attention.default
    torch.library.opcheck(
        op, (q, k, v, routed, *rest, [2, 4, 5, 2, 3, own], 0.3), rtol=1e-2, atol=1e-2
    )


class LargestOutput(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_memory_is_linear(monkeypatch, queries, own):
    tokens, num_routed, dim, mode = 128 * 128, 128, 16, LargestOutput()

    def watched(function):
        def run(*args):
            with mode:
                return function(*args)

        return run

    for name in (
        "forward",
        "backward",
    ):  # inside the operator, where a mode around it would not look
        monkeypatch.setattr(eager, name, watched(getattr(eager, name)))
    inputs = [
        *leaves(1, 1, tokens, dim, dtype=torch.float32),
        torch.zeros(1, num_routed, requires_grad=True),
    ]
    call = {
        "grid_size": (128, 128),
        "window_size": 8,
        "routed_indices": distinct((1,), num_routed, tokens),
    }
    call |= {"key_mask": randn(1, tokens, seed=5) > 0, "weight_own_window": own}
    monkeypatch.setattr(eager, "_PAIRS", tokens * dim)
    if queries:
        call["query_indices"] = distinct((1,), tokens // 2, tokens)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = operator(**call)(*inputs)
    # q, k, v, out and little more; no tensor of N² = 1024 N·D, nor of N·K = 8 N·D or N·w² = 4 N·D
    # logits
    assert 3 * inputs[0].nbytes < sum(kept.values()) < 4.5 * inputs[0].nbytes
    assert mode.largest == tokens * dim
    out.sum().backward()
    assert mode.largest <= 1.5 * tokens * dim  # log weights: eight more features


GOOD = torch.zeros(2, 4, 13, 8)
INT, MASK = torch.int64, torch.ones(2, 13, dtype=torch.bool)
ROUTED = torch.zeros(2, 3, dtype=INT)
BAD = [
    ("q", TypeError, [GOOD.long(), None, [1.0]]),
    ("q", ValueError, [GOOD[0]]),
    ("v", TypeError, [GOOD.bool(), [1.0]]),
    ("v", ValueError, [GOOD[0]]),
    ("grid_size", TypeError, [(3.0, 4), "3", None]),
    ("grid_size", ValueError, [(3, 5), (3, 4, 1), (0, 12), (-3, -4), 12]),
    ("window_size", TypeError, [2.5, None, (2, 1.0)]),
    ("window_size", ValueError, [0, (2, -1), (2,)]),
    ("num_prefix_tokens", TypeError, [True, 1.0]),
    ("num_prefix_tokens", ValueError, [-1]),
    ("routed_indices", TypeError, [ROUTED.int(), ROUTED.float()]),
    (
        "routed_indices",
        ValueError,
        [ROUTED[0], ROUTED[:1], torch.zeros(2, 3, 3, dtype=INT), ROUTED + 12, ROUTED - 2],
    ),
    ("log_weights", TypeError, [ROUTED, [[0.0] * 3] * 2]),
    ("log_weights", ValueError, [torch.zeros(2, 2), torch.zeros(2, 1, 3)]),
    ("key_mask", TypeError, [torch.ones(2, 13), torch.ones(2, 12)]),
    ("key_mask", ValueError, [MASK[:, :11], MASK[:1], MASK[None]]),
    ("query_indices", TypeError, [ROUTED.float(), ROUTED.int()]),
    ("query_indices", ValueError, [ROUTED[None], ROUTED[:1], ROUTED - 1, ROUTED + 12]),
    ("scale", ValueError, [0, NAN, INF]),
    ("routed_indices", TypeError, [[[0], [1]]]),
    ("routed_indices", ValueError, [torch.zeros(2, 0, 3, dtype=INT)]),
    ("key_mask", TypeError, [[[True] * 13] * 2]),
    ("query_indices", TypeError, [[[0], [1]]]),
    ("scale", TypeError, ["1", True]),
    ("weight_own_window", TypeError, [1, None, "yes"]),
]


def each(cases):
    return [(name, error, value) for name, error, values in cases for value in values]


@pytest.mark.parametrize(("name", "error", "value"), each(BAD))
def test_bad_input_names_the_argument(name, error, value):
    call = {
        "q": GOOD,
        "k": GOOD,
        "v": GOOD,
        "grid_size": (3, 4),
        "window_size": 2,
        "num_prefix_tokens": 1,
    }
    call |= {"routed_indices": ROUTED} if name == "log_weights" else {}
    with pytest.raises(error, match=rf"^{name}(\[\d\])?:"):
        routed_window_attention(**{**call, name: value})


def test_bad_combinations_name_the_arguments():
    call = {"grid_size": (3, 4), "window_size": 2, "num_prefix_tokens": 1}
    with pytest.raises(ValueError, match="^q, k, v:"):
        routed_window_attention(GOOD, GOOD[:, :, :12], GOOD, **call)
    with pytest.raises(TypeError, match="^q, k, v:"):
        routed_window_attention(GOOD, GOOD, GOOD.double(), **call)
    with pytest.raises(ValueError, match="^log_weights:"):
        routed_window_attention(GOOD, GOOD, GOOD, log_weights=torch.zeros(2, 3), **call)
    with pytest.raises(ValueError, match="^window_size:"):
        window_attention(GOOD, GOOD, GOOD, **{**call, "window_size": 0})
