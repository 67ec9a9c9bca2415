"""ConditionalRoutedAttention and the block of sequences: what they mean, and the predecessor where
it is right."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from colt5_vision import ConditionalRoutedTransformerBlock
from colt5_vision.branches import LightBranch
from colt5_vision.positions import rotary
from colt5_vision.sequence import ConditionalRoutedAttention

DIM, N = 12, 37
SHAPE = {
    "light_dim_head": 8,
    "light_heads": 2,
    "light_window_size": 8,
    "heavy_dim_head": 8,
    "heavy_heads": 4,
}


def stirred(module, seed=0):
    """The module in float64, every parameter off its initial zero."""
    torch.manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def attention(seed=0, **kwargs):
    torch.manual_seed(seed)
    return stirred(
        ConditionalRoutedAttention(DIM, **{"num_heavy_tokens_kv": 6, **SHAPE, **kwargs}), seed
    )


def tokens(batch=2, num=N, seed=1):
    return torch.randn(
        batch, num, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def some_mask(batch=2, num=N, seed=2):
    return torch.rand(batch, num, generator=torch.Generator().manual_seed(seed)) < 0.6


class LocalAttention(LightBranch):
    """The light branch of sequences by itself."""

    def __init__(self, reach):
        super().__init__(DIM, 2, 8, torch.nn.LayerNorm(DIM), reach=reach)

    def forward(self, x, mask):
        return LightBranch.forward(self, x, None, mask)


def band(module, x, mask):
    """Local attention with a mask over all pairs."""
    q, k, v = (
        t.unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for t in module.to_qkv(module.norm(x)).chunk(3, -1)
    )
    i = torch.arange(x.shape[1])
    seen = ((i[:, None] - i).abs() <= module.reach) & mask[:, None, None, :]
    return module.to_out(
        scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    )


@pytest.mark.parametrize("num, reach", [(1, 4), (3, 4), (4, 4), (12, 4), (13, 4), (9, 1), (5, 100)])
@pytest.mark.parametrize("masked", [False, True])
def test_local_attention_sees_its_band(num, reach, masked):
    module, x = stirred(LocalAttention(reach)), tokens(3, num)
    mask = some_mask(3, num) if masked else torch.ones(3, num, dtype=torch.bool)
    x = torch.where(mask.unsqueeze(-1), x, 0)
    got = module(x, mask if masked else None)
    torch.testing.assert_close(got[mask], band(module, x, mask)[mask], atol=1e-12, rtol=1e-12)


def test_memory_of_local_attention_grows_linearly():
    def largest(num):
        module, x = LocalAttention(32), torch.randn(1, num, DIM, requires_grad=True)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            module(x, None).sum().backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    small = largest(2048)
    assert small >= 2048 * DIM * 4
    assert largest(8192) <= 4.5 * small


def test_rotary_depends_on_the_offset_only():
    q, k = torch.randn(2, 1, 8).double()
    place = torch.tensor([3, 40])
    products = [rotary(q, place[:1] + i) @ rotary(k, place[1:] + i).T for i in (0, 5, 1000)]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])
    assert not torch.allclose(products[0], q @ k.T)
    with pytest.raises(ValueError, match="rotary_emb: head_dim must be even, got 7"):
        rotary(torch.randn(1, 7), place[:1])


def test_without_a_light_branch_tokens_that_are_not_routed_are_the_null_token():
    module, x = attention(has_light_attn=False, num_heavy_tokens_q=5, router="random"), tokens()
    asks = module.attend.q_router(x, num_tokens=5).indices[0, 0]
    same = (module(x) == module.attend.null_q_token).all(-1)
    assert not same[:, asks].any() and same.sum() == 2 * (N - 5)
    assert not [name for name, _ in module.named_parameters() if name.startswith("light")]


@pytest.mark.parametrize("make", [attention, "block"], ids=["attention", "block"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_every_sample_has_its_own_counts(make, masked, shares):
    """A batch with counts gives what its samples give one by one, each with its number; values and
    gradients."""
    if make == "block":
        counts = {
            "num_heavy_attn_tokens_q": 9,
            "num_heavy_attn_tokens_kv": 8,
            "num_heavy_ff_tokens": 9,
        }
        module = stirred(ConditionalRoutedTransformerBlock(DIM, **counts, **SHAPE))
    else:
        counts = {"num_heavy_tokens_q": 9, "num_heavy_tokens_kv": 8}
        module = attention(num_routed_kv=2, **counts)
    x, mask = tokens(3), some_mask(3) if masked else None
    valid = mask.sum(1) if masked else torch.full((3,), N)
    given = {
        name: torch.tensor([0.05, 0.2, 0.13]) if shares else torch.tensor([2, most, 5])
        for name, most in counts.items()
    }
    resolved = {
        name: (value * valid).round().long() if shares else value for name, value in given.items()
    }
    assert all((value < counts[name]).sum() >= 2 for name, value in resolved.items())

    def grads(x, mask, **kwargs):
        x = x.clone().requires_grad_()
        out = module(x, mask=mask, **kwargs)
        return out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])

    got = grads(x, mask, **given)
    most = {name: min(counts[name], N) for name in counts}
    singles = []
    for b in range(3):
        one = {name: value[b : b + 1].clamp(1, most[name]) for name, value in resolved.items()}
        each = grads(x[b : b + 1], mask[b : b + 1] if masked else None, **one)
        number = {
            name: int(value) for name, value in one.items()
        }  # a plain number gives the same, without slots to spare
        torch.testing.assert_close(
            each[0], grads(x[b : b + 1], mask[b : b + 1] if masked else None, **number)[0]
        )
        singles.append(each)
    torch.testing.assert_close(got[0], torch.cat([one[0] for one in singles]))
    torch.testing.assert_close(got[1], torch.cat([one[1] for one in singles]))
    for grad, *parts in zip(got[2:], *(one[2:] for one in singles), strict=True):
        torch.testing.assert_close(grad, sum(parts))


def test_a_block_over_a_sequence_is_the_attention_of_sequences():
    """One block takes maps and sequences; over these it is ConditionalRoutedAttention with the same
    weights."""
    counts = {"num_heavy_attn_tokens_q": 5, "num_heavy_attn_tokens_kv": 6, "num_heavy_ff_tokens": 7}
    for kwargs in ({}, {"rotary_emb": True}, {"has_light_attn": False}, {"num_routed_kv": 2}):
        block = stirred(ConditionalRoutedTransformerBlock(DIM, **counts, **SHAPE, **kwargs))
        own = attention(num_heavy_tokens_q=5, **kwargs)
        own.load_state_dict(block.conditional_attn.state_dict())
        x, mask = tokens(), some_mask()
        for given in ({}, {"mask": mask}):
            want = x + own(x, **given)
            want = want + block.conditional_ff(want, **given)
            torch.testing.assert_close(block(x, **given), want, atol=0, rtol=0)
        assert block(torch.randn(2, DIM, 5, 9).double()).isfinite().all()
    other = ConditionalRoutedTransformerBlock(
        DIM, **counts, router_straight_through=False, router_kwargs={"eps": 3.0}
    )
    routers = [
        other.conditional_attn.attend.q_router,
        other.conditional_attn.attend.kv_router,
        other.conditional_ff.router,
    ]
    assert all(not router.straight_through and router.eps == 3.0 for router in routers)
    default = ConditionalRoutedTransformerBlock(DIM, **counts).conditional_attn
    assert (default.attend.light_attn.window_size, default.line_window_size) == ((16, 16), 128)


@pytest.mark.parametrize(
    "kwargs, x, text",
    [
        ({"fusion": "softmax"}, torch.randn(2, 5, DIM), "^x: a sequence needs fusion='sum'"),
        (
            {"light_window_size": (2, 3)},
            torch.randn(2, 5, DIM),
            "^x: a sequence needs a light_window_size that is one",
        ),
        (
            {"light_window_size": 1},
            torch.randn(2, 5, DIM),
            "^x: a sequence needs a light_window_size that is one",
        ),
        (
            {},
            torch.randn(5, DIM),
            r"^x: expected a map of 4 dimensions or a sequence of 3, got shape \(5, 12\)",
        ),
        ({}, torch.randn(2, 5, DIM + 1), r"^x: expected \(B, N, 12\)"),
        ({}, torch.randn(2, DIM + 1, 5, 5), "^x: expected 12 channels"),
    ],
)
def test_what_a_block_does_not_take(kwargs, x, text):
    counts = {"num_heavy_attn_tokens_kv": 4, "num_heavy_ff_tokens": 4}
    with pytest.raises(ValueError, match=text):
        ConditionalRoutedTransformerBlock(DIM, **counts, **kwargs)(x)


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("num_routed_kv", {"num_routed_kv": 3}),
        ("light_window_size", {"light_window_size": 1}),
        ("light_heads", {"light_heads": 0}),
        ("light_dim_head", {"light_dim_head": 1.5}),
        ("heavy_heads", {"heavy_heads": 0}),
        ("heavy_dim_head", {"heavy_dim_head": 7, "rotary_emb": True}),
        ("num_heavy_tokens_kv", {"num_heavy_tokens_kv": 0}),
        ("num_heavy_tokens_q", {"num_heavy_tokens_q": 1.5}),
        ("multiply_queries_by_score", {"multiply_queries_by_score": True}),
        ("use_null_q_tokens", {"use_null_q_tokens": True}),
        ("router", {"router": "best"}),
        ("num_routing_tokens", {"router_kwargs": {"num_routing_tokens": 2}}),
        ("dim", {"dim": 0}),
    ],
)
def test_constructor_errors_name_the_argument(name, kwargs):
    with pytest.raises((ValueError, TypeError), match=rf"^[\w, \['\]]*\b{name}\b.*: "):
        ConditionalRoutedAttention(**{"dim": DIM, "num_heavy_tokens_kv": 4, **SHAPE, **kwargs})


@pytest.mark.parametrize(
    "name, call",
    [
        ("x", {"x": torch.randn(2, DIM, 4, 4)}),
        ("x", {"x": torch.randn(2, 5, DIM + 1)}),
        ("x", {"x": torch.randn(2, 0, DIM)}),
        ("x", {"x": None}),
        ("mask", {"mask": torch.ones(2, N)}),
        ("mask", {"mask": torch.ones(1, N, dtype=torch.bool)}),
        ("num_heavy_tokens_q", {"num_heavy_tokens_q": 3}),
        ("num_heavy_tokens_kv", {"num_heavy_tokens_kv": 0}),
        ("num_heavy_tokens_kv", {"num_heavy_tokens_kv": torch.tensor([1, 0])}),
        ("num_heavy_tokens_kv", {"num_heavy_tokens_kv": torch.tensor([1])}),
    ],
)
def test_call_errors_name_the_argument(name, call):
    module = ConditionalRoutedAttention(DIM, num_heavy_tokens_kv=4, **SHAPE)
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
        module(**{"x": torch.randn(2, N, DIM), **call})
