"""The window ∪ routed kernels: against dense attention in float64, with the eager error as the
budget of the halves."""

from functools import partial

import pytest
import torch

from colt5_vision import ConditionalRoutedImageAttention
from colt5_vision.ops import backend, routed_window_attention, window_attention
from colt5_vision.ops.routed_window_attention import triton as kernels
from colt5_vision.ops.routed_window_attention.reference import window_of
from tests.support.attention_cases import (
    dense,
    distinct,
    errors,
    leaves,
    operator,
    out_and_grads,
    randn,
)
from tests.support.switched_off import broken, removed_route

# a GPU takes the halves only, and goes through every case with them
DTYPE = torch.float32 if backend.INTERPRETED else torch.float16
HALVES = (torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")


# tokens 63, 111 and 576 + 1; every width of head; window pairs and windows larger than the map
CASES = {
    "plain": {"grid_size": (7, 9), "window_size": 4, "head_dim": 40, "keys": 8},
    "weights": {
        "grid_size": (7, 9),
        "window_size": (3, 5),
        "head_dim": 32,
        "keys": 8,
        "weights": True,
    },
    "beyond": {
        "grid_size": (7, 9),
        "window_size": 4,
        "head_dim": 96,
        "keys": 8,
        "weights": True,
        "own": False,
    },
    "routes": {
        "grid_size": (37, 3),
        "window_size": (16, 2),
        "head_dim": 16,
        "heads": 4,
        "routes": 2,
        "keys": 20,
        "weights": True,
        "prefix": 3,
        "mask": True,
        "batch": 2,
    },
    "small": {
        "grid_size": (4, 5),
        "window_size": 3,
        "head_dim": 16,
        "routes": 2,
        "keys": 6,
        "weights": True,
        "prefix": 1,
        "mask": True,
        "batch": 2,
    },
    "prefix": {
        "grid_size": (24, 24),
        "window_size": 8,
        "head_dim": 40,
        "keys": 36,
        "prefix": 1,
        "weights": True,
    },
    "queries": {
        "grid_size": (7, 9),
        "window_size": 4,
        "head_dim": 80,
        "keys": 8,
        "routes": 2,
        "weights": True,
        "prefix": 2,
        "mask": True,
        "queries": 21,
        "batch": 2,
    },
    "few queries": {"grid_size": (3, 5), "window_size": 2, "head_dim": 40, "keys": 5, "queries": 2},
    "window alone": {
        "grid_size": (5, 6),
        "window_size": 4,
        "head_dim": 40,
        "mask": True,
        "batch": 2,
    },
    "window and prefix": {
        "grid_size": (5, 6),
        "window_size": 4,
        "head_dim": 40,
        "prefix": 2,
        "mask": True,
    },
    "one window": {
        "grid_size": (5, 6),
        "window_size": 40,
        "head_dim": 24,
        "keys": 5,
        "weights": True,
    },
    "wide head": {
        "grid_size": (6, 5),
        "window_size": 4,
        "head_dim": 256,
        "keys": 4,
        "weights": True,
        "prefix": 1,
    },
    "narrow head": {"grid_size": (1, 9), "window_size": 4, "head_dim": 7, "keys": 2, "heads": 1},
}


def case(name, device, dtype=DTYPE):
    """Leaves [q, k, v, log weights or None] in ``dtype`` and the same in float64, and the keywords
    of the call."""
    spec = {"batch": 1, "heads": 2, "routes": 1, "prefix": 0, "keys": 0, "own": True} | CASES[name]
    tokens = spec["grid_size"][0] * spec["grid_size"][1]
    batch, length = spec["batch"], spec["prefix"] + tokens
    inputs = leaves(batch, spec["heads"], length, spec["head_dim"], dtype=dtype)
    call = {
        "grid_size": spec["grid_size"],
        "window_size": spec["window_size"],
        "num_prefix_tokens": spec["prefix"],
    }
    weights = None
    if spec["keys"]:
        routed = distinct((batch, spec["routes"]), spec["keys"], tokens, seed=5)
        routed[..., -1] = -1  # an empty slot
        call |= {"routed_indices": routed.to(device), "weight_own_window": spec["own"]}
        if spec.get("weights"):
            weights = randn(batch, spec["routes"], spec["keys"], seed=7)
            weights[..., 1] = -INF
    if spec.get("mask"):
        call["key_mask"] = (randn(batch, length, seed=9) > -0.8).to(device)
    if "queries" in spec:
        call["query_indices"] = distinct((batch,), spec["queries"], tokens, seed=11).to(device)
    weights = None if weights is None else weights.to(device, torch.float32).requires_grad_()
    given = [*(x.detach().to(device).requires_grad_() for x in inputs), weights]
    exact = [None if x is None else x.detach().cpu().double().requires_grad_() for x in given]
    return given, exact, call


def on_cpu(call):
    return {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name, device):
    given, exact, call = case(name, device)
    found = out_and_grads(operator(**call), given)
    wanted = out_and_grads(dense(**on_cpu(call)), exact)
    limit = 2e-6 if torch.float32 == DTYPE else 4e-3
    assert max(errors(found, wanted)) < limit


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_no_worse_than_eager(dtype, device):
    """Errors of out and of each gradient, over several cases: the few log weights of one case are
    mere chance."""
    found, budget = [], []
    for name in ("weights", "beyond", "routes", "queries"):
        given, exact, call = case(name, device, dtype)
        wanted = out_and_grads(dense(**on_cpu(call)), exact)
        found.append(errors(out_and_grads(operator(**call, backend="triton"), given), wanted))
        budget.append(errors(out_and_grads(operator(**call, backend="eager"), given), wanted))
    found, budget = (torch.tensor(x).square().mean(0).sqrt() for x in (found, budget))
    assert (found <= 1.1 * budget).all(), (found, budget)


def test_no_key_of_another_piece_is_lost(device, monkeypatch):
    """Long loops over keys or queries are cut into pieces, here of 16."""
    given, exact, call = case("prefix", device)
    monkeypatch.setattr(kernels, "_PIECE", 16)
    found = out_and_grads(operator(**call), given)
    assert max(errors(found, out_and_grads(dense(**on_cpu(call)), exact))) < (
        2e-6 if torch.float32 == DTYPE else 4e-3
    )


def test_everything_routed_is_full_attention(device):
    inputs = leaves(1, 2, 35, 16, dtype=DTYPE)
    routed = torch.arange(35, device=device).flip(0)[None]
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    call = {"grid_size": (5, 7), "window_size": 3, "routed_indices": routed}
    found = out_and_grads(lambda *x: routed_window_attention(*x, **call), inputs)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    wanted = out_and_grads(torch.nn.functional.scaled_dot_product_attention, exact)
    assert max(errors(found, wanted)) < (2e-6 if torch.float32 == DTYPE else 4e-3)


def test_masked_keys_are_never_read(device):
    given, _, call = case("small", device)
    want = out_and_grads(operator(**call), given)
    off = ~call["key_mask"][:, None, :, None]
    poisoned = [
        given[0],
        *(x.detach().masked_fill(off, NAN).requires_grad_() for x in given[1:3]),
        given[3],
    ]
    for a, b in zip(out_and_grads(operator(**call), poisoned), want, strict=True):
        assert torch.equal(a, b)
    for grad in want[2:4]:
        assert not grad.masked_select(off).any()


def test_a_row_without_any_key_is_zero(device):
    given, _, call = case("small", device)
    call["key_mask"][0] = False
    out, *grads = out_and_grads(operator(**call), given)
    assert not out[0].any() and out[1].any()
    assert all(x.isfinite().all() and not x[0].any() for x in grads)


def test_samples_do_not_mix(device):
    given, _, call = case("queries", device)
    with torch.no_grad():
        want = operator(**call)(*given)
        given[0][0, 0, 3] = NAN
        given[1][0, 1, 4] = INF
        assert torch.equal(operator(**call)(*given)[1], want[1])
        for sample in range(2):
            one = {
                n: x[sample : sample + 1] if isinstance(x, torch.Tensor) else x
                for n, x in call.items()
            }
            alone = operator(**one)(*(x[sample : sample + 1] for x in given))
            if sample:
                assert torch.equal(alone, want[1:])


def test_a_run_repeats_bit_by_bit(device):
    given, _, call = case("prefix", device)
    for a, b in zip(
        out_and_grads(operator(**call), given), out_and_grads(operator(**call), given), strict=True
    ):
        assert torch.equal(a, b)


def test_any_strides(device):
    """Parts of one projection, heads first, a last stride of 2, and an expanded gradient."""
    given, _, call = case("small", device)
    plain = [x.detach() for x in given[:3]]
    packed = torch.cat([x.transpose(1, 2).flatten(2) for x in plain], -1)
    parts = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in packed.chunk(3, -1)]
    sparse = torch.stack([plain[1], plain[1]], -1).flatten(-2)[..., ::2]
    assert parts[0].stride(2) != plain[0].stride(2) and sparse.stride(-1) == 2
    want = operator(**call)(*plain, given[3])
    for inputs in (parts, [plain[0], sparse, plain[2]]):
        assert torch.equal(operator(**call)(*inputs, given[3]), want)
    (grad,) = torch.autograd.grad(operator(**call)(*given).sum(), given[0])
    ones = torch.ones_like(want).contiguous()
    (same,) = torch.autograd.grad(operator(**call)(*given), given[0], ones)
    assert torch.equal(grad, same)


def test_empty_batch(device):
    q = torch.zeros(0, 2, 20, 16, dtype=DTYPE, device=device, requires_grad=True)
    call = {"grid_size": (4, 4), "window_size": 2, "num_prefix_tokens": 4}
    routed = torch.zeros(0, 3, dtype=torch.int64, device=device)
    (out := routed_window_attention(q, q, q, routed_indices=routed, **call)).sum().backward()
    assert out.shape == q.shape == q.grad.shape


@pytest.mark.parametrize("name", ["small", "few queries", "window alone"])
def test_opcheck(name, device):
    given, _, call = case(name, device)
    nothing = torch.empty(len(given[0]), 1, 0, dtype=torch.int64, device=device)
    routed = call.get("routed_indices", nothing)
    height, width = call["grid_size"]
    window = (
        call["window_size"]
        if isinstance(call["window_size"], tuple)
        else (call["window_size"],) * 2
    )
    grid = [call["num_prefix_tokens"], height, width, *window, 1]
    args = (
        *given[:3],
        routed,
        given[3],
        call.get("key_mask"),
        call.get("query_indices"),
        grid,
        0.3,
        "triton",
    )
    operator = torch.ops.colt5_vision.routed_window_attention.default
    torch.library.opcheck(operator, args, rtol=1e-2, atol=1e-2)


def test_compiles_once_for_all_sizes(device):
    def attend(routed, height, width, q, k, v):
        return routed_window_attention(
            q,
            k,
            v,
            grid_size=(height, width),
            window_size=4,
            routed_indices=routed,
            backend="triton",
        )

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for height, width in ((5, 7), (6, 9), (8, 11)):
        inputs = [
            x.detach().to(device).requires_grad_()
            for x in leaves(2, 2, height * width, 16, dtype=DTYPE)
        ]
        routed = distinct((2,), 3, height * width).to(device)
        found, wanted = (
            out_and_grads(partial(f, routed, height, width), inputs) for f in (compiled, attend)
        )
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_window_attention_is_the_same_kernel(device):
    inputs = [x.detach().to(device).requires_grad_() for x in leaves(1, 2, 63, 40, dtype=DTYPE)]
    call = {"grid_size": (7, 9), "window_size": 4}
    found = out_and_grads(lambda *x: window_attention(*x, **call), inputs)
    for a, b in zip(
        found, out_and_grads(lambda *x: routed_window_attention(*x, **call), inputs), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fusion", ["softmax", "sum"])
def test_module_equals_eager(fusion, device, monkeypatch):
    torch.manual_seed(0)
    heads = {"light_heads": 2, "heavy_heads": 2, "light_dim_head": 16, "heavy_dim_head": 16}
    counts = {"num_heavy_tokens_q": 12, "num_heavy_tokens_kv": 8, "num_routed_kv": 2}
    module = ConditionalRoutedImageAttention(
        24, **heads, **counts, light_window_size=4, fusion=fusion, rotary_emb=True
    )
    module = module.to(device, DTYPE)
    x, mask = (
        randn(2, 24, 7, 9, dtype=DTYPE).to(device).requires_grad_(),
        (randn(2, 7, 9, seed=4) > -1).to(device),
    )

    def run():
        module.zero_grad()
        out = module(x, mask=mask)
        out.square().sum().backward()
        grads = [x.grad.clone(), *(p.grad.clone() for p in module.parameters())]
        x.grad = None
        return [out.detach(), *grads]

    found = run()
    monkeypatch.setenv(backend.VARIABLE, "eager")
    wanted = run()
    limit = 1e-4 if torch.float32 == DTYPE else 2e-2
    assert max(errors(found, [b.cpu().double() for b in wanted])) < limit


def test_indices_out_of_range_are_empty_slots(device):
    """Values are not looked at on a GPU: nothing may be read or written beyond the sample."""
    given, _, call = case("small", device)
    want_call = call | {"routed_indices": call["routed_indices"].clone()}
    want_call["routed_indices"][:, :, 0] = -1
    want = out_and_grads(operator(**want_call), given)
    q, k, v, weights = given
    routed = call["routed_indices"].clone()
    routed[:, :, 0] = 20  # N
    grid = [1, 4, 5, 3, 3, 1]
    args = (q, k, v, routed, weights, call["key_mask"], None, grid, 16**-0.5, "triton")
    found = out_and_grads(
        lambda *_: torch.ops.colt5_vision.routed_window_attention(*args)[0], given
    )
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("queries", [0, None])
def test_nothing_to_route_or_nobody_to_ask(keys, queries, device):
    inputs = [x.detach().to(device).requires_grad_() for x in leaves(1, 2, 12, 16, dtype=DTYPE)]
    weights = torch.zeros(1, keys, device=device, requires_grad=True)
    call = {
        "grid_size": (3, 4),
        "window_size": 2,
        "routed_indices": distinct((1,), keys, 12).to(device),
    }
    if queries is not None:
        call["query_indices"] = torch.empty(1, 0, dtype=torch.int64, device=device)
    out = routed_window_attention(*inputs, log_weights=weights, **call)
    want = routed_window_attention(*inputs, log_weights=weights, **call, backend="eager")
    assert out.shape == want.shape
    for a, b in zip(
        torch.autograd.grad(out.sum(), [*inputs, weights]),
        torch.autograd.grad(want.sum(), [*inputs, weights]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5 if torch.float32 == DTYPE else 1e-2, rtol=1e-2)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_removed_key_is_never_read(value, device):
    """A log weight of -inf takes a key from its own window, too; gradients as without its NaN."""
    (q, k, v, weights), call, tokens = removed_route(0, DTYPE)
    call["routed_indices"] = call["routed_indices"].to(device)
    clean = [x.to(device).requires_grad_() for x in (q, k, v, weights)]
    spoilt = [q, *(broken(x, value, tokens, 0) for x in (k, v)), weights]
    spoilt = [x.to(device).requires_grad_() for x in spoilt]
    found, want = (
        [out, *torch.autograd.grad(out.sin().sum(), x)]
        for x in (spoilt, clean)
        for out in (operator(**call)(*x),)
    )
    for a, b in zip(found, want, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)

    # in its own window it is read where weights hold beyond
    call["weight_own_window"] = False
    apart = window_of(4, 5, (2, 3))[tokens][..., None] != window_of(4, 5, (2, 3))
    apart = apart.repeat_interleave(2, 1).to(device)
    found, want = (operator(**call)(*x) for x in (spoilt, clean))
    assert torch.equal(found[apart], want[apart])
