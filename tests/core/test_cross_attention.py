"""ConditionalRoutedCrossAttention: what it means, its memory, and the predecessor's pieces where
they are right."""

import subprocess
import sys

import pytest
import torch

from colt5_vision.cross_attention import ConditionalRoutedCrossAttention
from tests.support.marks import further

DIM, N, M = 12, 9, 41


def cross(seed=0, **kwargs):
    """The module in float64, every parameter off its initial zero."""
    torch.manual_seed(seed)
    module = ConditionalRoutedCrossAttention(
        DIM, **{"num_tokens_kv": 6, "dim_head": 8, "heads": 4, **kwargs}
    ).double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def inputs(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, num, DIM, generator=generator, dtype=torch.float64) for num in (N, M)
    ]


def some_mask(num, batch=2, seed=2):
    return torch.rand(batch, num, generator=torch.Generator().manual_seed(seed)) < 0.6


KINDS = {
    "all": {},
    "routed": {"num_tokens_q": 4, "kv_routing_tokens": 2},
    "soft": {"num_tokens_q": 4, "router_straight_through": False, "multiply_keys_by_score": True},
    "blocks": {"num_tokens_q": 4, "kv_router_kwargs": {"cell_size": (1, 10)}},
    "queried": {"num_tokens_q": 4, "kv_routing_tokens": 2, "routing_from_queries": True},
    "mean": {"router": "mean_query"},
}
every_kind = pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS.keys())


@every_kind
@pytest.mark.parametrize("with_grad", [True, False])
def test_masked_tokens_of_the_context_are_never_read(kwargs, with_grad):
    """NaN in them is harmless, their gradient 0; the same as a context without them."""
    module, (x, context), mask = cross(**kwargs), inputs(), some_mask(M)
    mask[1], mask[1, 7:10] = False, True  # fewer valid tokens than slots
    poisoned = torch.where(mask.unsqueeze(-1), context, float("nan"))
    if not with_grad:
        with torch.no_grad():
            assert torch.equal(
                module(x, poisoned, context_mask=mask), module(x, context, context_mask=mask)
            )
        return
    grads = []
    for memories in (context, poisoned):
        memories = memories.clone().requires_grad_()
        out = module(x, memories, context_mask=mask)
        grads.append(
            torch.autograd.grad(
                out.square().sum(), [memories, *module.parameters()], allow_unused=True
            )
        )
        assert (grads[-1][0][~mask] == 0).all() and grads[-1][0].isfinite().all()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))
    if module.kv_router.cell_size is None:
        for b in range(2):
            alone = module(x[b : b + 1], context[b : b + 1, mask[b]])
            torch.testing.assert_close(out[b : b + 1], alone, atol=1e-12, rtol=1e-9)


@every_kind
def test_a_wholly_masked_context(kwargs):
    """Nothing but the null key is read: the same for all who ask, and finite gradients."""
    module, (x, context), mask = cross(**kwargs), inputs(), some_mask(M)
    mask[1] = False
    want = module(x, context, context_mask=mask)
    out = module(
        x,
        torch.where(mask.unsqueeze(-1), context, float("inf")).requires_grad_(),
        context_mask=mask,
    )
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.square().sum(), list(module.parameters()), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    with torch.no_grad():
        assert torch.equal(module(x, context, context_mask=mask), out)
        module.heavy_attn.null_key.kv[1] = 0
        if module.null_q_token is None:
            assert (module(x, context, context_mask=mask)[1] == 0).all()


@every_kind
def test_masked_queries(kwargs):
    module, (x, context), mask = cross(**kwargs), inputs(), some_mask(N)
    mask[1] = False
    x.requires_grad_()
    out = module(x, context, mask=mask)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert (out[~mask] == 0).all() and (grad[~mask] == 0).all() and grad.isfinite().all()
    poisoned = torch.where(mask.unsqueeze(-1), x, float("nan"))
    assert torch.equal(module(poisoned, context, mask=mask), out)


def read_tokens(module, x, context, **call):
    """Indices (B, R, K) of the context that a call routes."""
    seen = []
    hook = module.kv_router.register_forward_hook(lambda *args: seen.append(args[-1].indices))
    module(x, context, **call)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("count", [5, 9])
def test_every_block_of_the_context_has_its_share_and_none_is_dropped(count):
    module, (x, context) = (
        cross(kv_router_kwargs={"cell_size": (1, 10)}, num_tokens_kv=count),
        inputs(),
    )
    routed = read_tokens(module, x, context)[:, 0]
    shares = torch.stack([(routed // 10 == block).sum(-1) for block in range(5)], -1)
    assert (shares[:, :4] >= count // 5).all() and (shares.sum(-1) == count).all()
    read = (
        torch.autograd.functional.jacobian(lambda c: module(x[:1], c).sum(), context[:1])
        .abs()
        .amax(-1)[0]
    )
    assert set(routed[0].tolist()) <= set((read > 0).nonzero().flatten().tolist())
    every = read_tokens(module, x, context, num_tokens_kv=1.0)
    assert (every.sort().values == torch.arange(M)).all()


def test_routing_from_queries_hangs_on_who_asks():
    module, (x, context) = cross(**KINDS["queried"]), inputs()

    def chosen(x, mask=None):
        return read_tokens(module, x, context, mask=mask, num_tokens_kv=6)

    before, mask = chosen(x), torch.ones(2, N, dtype=torch.bool)
    mask[:, 3] = False
    changed = x.clone()
    changed[1] = 5 * inputs(seed=5)[0][1]
    assert torch.equal(chosen(changed)[0], before[0]) and not torch.equal(
        chosen(changed)[1], before[1]
    )
    cut = x[:, mask[0]]
    masked = torch.where(mask.unsqueeze(-1), x, 0)
    assert torch.equal(chosen(masked, mask), chosen(cut)) and not torch.equal(chosen(cut), before)
    plain = cross(num_tokens_q=4, kv_routing_tokens=2)
    same = [read_tokens(plain, y, context, num_tokens_kv=6) for y in (x, changed)]
    assert torch.equal(*same)
    out = (
        module(x, context).square().sum()
    )  # routing tokens and what they read with learn through the gates
    for name, grad in zip(
        dict(module.routing_tokens.named_parameters()),
        torch.autograd.grad(out, list(module.routing_tokens.parameters())),
    ):
        assert (grad != 0).any(), name


def test_mean_query_chooses_what_the_mean_attends_to():
    module, (x, context), mask = cross(router="mean_query"), inputs(), some_mask(N)
    x = torch.where(mask.unsqueeze(-1), x, 0)
    got = read_tokens(module, x, context, mask=mask, num_tokens_kv=6)[:, 0]
    for b in range(2):
        unit = torch.nn.functional.normalize
        want = (unit(context[b], dim=-1) @ unit(x[b, mask[b]], dim=-1).mean(0)).topk(6).indices
        assert torch.equal(got[b], want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_every_sample_has_its_own_counts(masked, shares):
    module, (x, context) = cross(num_tokens_q=4, num_tokens_kv=8, kv_routing_tokens=2), inputs(3)
    mask, context_mask = (some_mask(N, 3), some_mask(M, 3)) if masked else (None, None)
    given = {"num_tokens_q": torch.tensor([1, 4, 3]), "num_tokens_kv": torch.tensor([8, 1, 5])}
    if shares:
        given = {
            "num_tokens_q": torch.tensor([0.21, 0.37, 0.13]),
            "num_tokens_kv": torch.tensor([0.17, 0.03, 0.11]),
        }
    out = module(x, context, mask=mask, context_mask=context_mask, **given)
    for b in range(3):
        one = [None if t is None else t[b : b + 1] for t in (mask, context_mask)]
        valid = {
            "num_tokens_q": int(one[0].sum()) if masked else N,
            "num_tokens_kv": int(one[1].sum()) if masked else M,
        }
        number = {
            k: max(1, round(float(v[b]) * valid[k])) if shares else int(v[b])
            for k, v in given.items()
        }
        want = module(x[b : b + 1], context[b : b + 1], mask=one[0], context_mask=one[1], **number)
        torch.testing.assert_close(out[b : b + 1], want, atol=1e-12, rtol=1e-9)


MEMORY = """
import re, torch
from colt5_vision.cross_attention import ConditionalRoutedCrossAttention
torch.manual_seed(0)
module = ConditionalRoutedCrossAttention(
    64, num_tokens_q=512, num_tokens_kv=1024, kv_routing_tokens=2, kv_router_kwargs={kwargs},
    routing_from_queries={queried},
)
x, context = torch.randn(1, 1024, 64), torch.randn(1, 1_048_576, 64)
masks = {{"mask": torch.rand(1, 1024) < 0.9, "context_mask": torch.rand(1, 1_048_576) < 0.9}}
masks = masks if {masked} else {{}}
# not ru_maxrss: a process starts with that of the one that started it
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
with torch.no_grad():
    out = module(x, context, **masks)
assert out.shape == x.shape and out.isfinite().all()
print(peak() - before, context.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "block, queried, masked",
    [(None, True, True), *further((None, False, False), (131_072, False, True))],
)
def test_a_million_tokens_of_context_are_not_copied(block, queried, masked):
    """Asked for: 2 GiB beyond the input. Held: less than one copy of the context, 256 MiB."""
    kwargs = {} if block is None else {"cell_size": (1, block)}
    code = MEMORY.format(kwargs=kwargs, queried=queried, masked=masked)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extra, size = map(int, done.stdout.split())
    assert size == 2**28 and 2**22 < extra < size, f"{extra / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("kv_routing_tokens", {"kv_routing_tokens": 3}),
        ("cell_size", {"kv_router_kwargs": {"cell_size": 0}}),
        ("use_null_q_tokens", {"use_null_q_tokens": True}),
        ("routing_from_queries", {"routing_from_queries": True, "router": "grid"}),
        ("num_routing_tokens", {"router_kwargs": {"num_routing_tokens": 2}}),
        ("num_tokens_q", {"num_tokens_q": 0}),
        ("num_tokens_kv", {"num_tokens_kv": 1.5}),
        ("heads", {"heads": 0}),
        ("dim_head", {"dim_head": 0}),
        ("dim", {"dim": 0}),
    ],
)
def test_constructor_errors_name_the_argument(name, kwargs):
    with pytest.raises((ValueError, TypeError), match=rf"^[\w, \['\]]*\b{name}\b.*: ") as error:
        ConditionalRoutedCrossAttention(**{"dim": DIM, "num_tokens_kv": 4, "heads": 4, **kwargs})
    assert name != "num_sets_kv" or "use kv_routing_tokens" in str(error.value)


@pytest.mark.parametrize(
    "name, call",
    [
        ("x", {"x": torch.randn(2, N, DIM + 1)}),
        ("x", {"x": torch.randn(2, 0, DIM)}),
        ("context", {"context": torch.randn(2, M, DIM - 1)}),
        ("context", {"context": torch.randn(2, 0, DIM)}),
        ("context", {"context": torch.randn(1, M, DIM)}),
        ("context", {"context": torch.ones(2, M, DIM, dtype=torch.long)}),
        ("mask", {"mask": torch.ones(2, M, dtype=torch.bool)}),
        ("context_mask", {"context_mask": torch.ones(2, N, dtype=torch.bool)}),
        ("context_mask", {"context_mask": torch.ones(2, M)}),
        ("num_tokens_q", {"num_tokens_q": 2}),
        ("num_tokens_kv", {"num_tokens_kv": torch.tensor([1.5, 0.5])}),
    ],
)
def test_call_errors_name_the_argument(name, call):
    module = ConditionalRoutedCrossAttention(DIM, num_tokens_kv=4)
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
        module(**{"x": torch.randn(2, N, DIM), "context": torch.randn(2, M, DIM), **call})
