"""convert.py: the predecessor's weights give the predecessor's outputs wherever it is right; where
not, the fault."""

import warnings

import colt5_attention as predecessor
import pytest
import torch
from colt5_attention.transformer_block import RMSNorm as TheirNorm
from torch import nn

import colt5_vision
from colt5_vision import compat
from colt5_vision.compat import convert_colt5_attention_state_dict

DIM, N, W = 16, 37, 8
HEAVY = {"heavy_dim_head": 8, "heavy_heads": 2}
SHAPE = {**HEAVY, "light_dim_head": 8, "light_heads": 2, "light_window_size": W}
# no schedule and a high temperature: few gates are capped, so that its top-k on them is one on the
# logits
GATES = {"n_iters": 50, "eps": 6.0, "eps_init": 6.0, "eps_decay": 1.0}
CASES = {
    "ff": ("ConditionalRoutedFeedForward", {"num_heavy_tokens": 7}),
    "ff-soft": (
        "ConditionalRoutedFeedForward",
        {"num_heavy_tokens": 7, "router_straight_through": False},
    ),
    "attention": (
        "ConditionalRoutedAttention",
        {**SHAPE, "num_heavy_tokens_q": 7, "num_heavy_tokens_kv": 9},
    ),
    "attention-rotary-2": (
        "ConditionalRoutedAttention",
        {
            **SHAPE,
            "num_heavy_tokens_q": 7,
            "num_heavy_tokens_kv": 9,
            "num_routed_kv": 2,
            "rotary_emb": True,
        },
    ),
    "attention-soft": (
        "ConditionalRoutedAttention",
        {
            **SHAPE,
            "num_heavy_tokens_q": 7,
            "num_heavy_tokens_kv": 9,
            "router_straight_through": False,
            "multiply_keys_by_score": True,
            "multiply_queries_by_score": True,
            "use_null_q_tokens": False,
        },
    ),
    "attention-heavy": (
        "ConditionalRoutedAttention",
        {**HEAVY, "has_light_attn": False, "num_heavy_tokens_q": 7, "num_heavy_tokens_kv": 9},
    ),
    "attention-all-soft": (
        "ConditionalRoutedAttention",
        {
            **SHAPE,
            "num_heavy_tokens_q": 99,
            "num_heavy_tokens_kv": 99,
            "router_straight_through": False,
        },
    ),
    "attention-all": (
        "ConditionalRoutedAttention",
        {**SHAPE, "num_heavy_tokens_q": 99, "num_heavy_tokens_kv": 99},
    ),
    "block": (
        "ConditionalRoutedTransformerBlock",
        {
            **SHAPE,
            "num_heavy_attn_tokens_q": 7,
            "num_heavy_attn_tokens_kv": 9,
            "num_heavy_ff_tokens": 7,
        },
    ),
    "autoregressive": (
        "ConditionalRoutedAutoregressiveAttention",
        {**SHAPE, "num_heavy_tokens_q": W, "num_heavy_tokens_kv": 5},
    ),
    "autoregressive-rotary": (
        "ConditionalRoutedAutoregressiveAttention",
        {
            **SHAPE,
            "num_heavy_tokens_q": W,
            "num_heavy_tokens_kv": 5,
            "heavy_window_size": W // 2,
            "rotary_emb": True,
        },
    ),
}


def pair(kind, library=compat, **kwargs):
    """Both modules, made with the same arguments, ours with the other's weights."""
    torch.manual_seed(0)
    theirs = getattr(predecessor, kind)(router_kwargs=GATES, **kwargs).double()
    ours = getattr(library, kind)(router_kwargs=GATES, **kwargs).double()
    ours.load_state_dict(convert_colt5_attention_state_dict(theirs.state_dict(), ours))
    return theirs, ours


def tokens(*shape, seed=1):
    """Tokens whose norms differ by a factor of 5: ``x · w`` chooses others than ``x / |x| · w``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x * (0.4 + 1.6 * torch.rand(*shape[:-1], 1, generator=generator))


def routers(module):
    return [
        part for part in module.modules() if isinstance(part, colt5_vision.CoordinateDescentRouter)
    ]


def normalizing(module):
    for router in routers(module):
        router.normalize = True
    return module


LIBRARIES = pytest.mark.parametrize("library", [colt5_vision, compat], ids=["core", "compat"])


@LIBRARIES
@pytest.mark.parametrize("kind, kwargs", CASES.values(), ids=CASES)
@torch.no_grad()
def test_equal_outputs(kind, kwargs, library):
    """One sample. A mask of ones, where it takes one: see the next test."""
    theirs, ours = pair(kind, library, dim=DIM, **kwargs)
    x = tokens(1, N, DIM)
    causal = kind == "ConditionalRoutedAutoregressiveAttention"
    want = theirs(x) if causal else theirs(x, mask=torch.ones(1, N, dtype=torch.bool))
    torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=0)
    for small in (0.02, 1e-4):  # embeddings often start so: an eps in our norms would show
        want = (
            theirs(small * x)
            if causal
            else theirs(small * x, mask=torch.ones(1, N, dtype=torch.bool))
        )
        torch.testing.assert_close(ours(small * x), want, atol=1e-5, rtol=0)
    want = theirs(x) if causal else theirs(x, mask=torch.ones(1, N, dtype=torch.bool))
    if kwargs.get("num_heavy_tokens_q") != 99:
        other = normalizing(ours)(x)
        assert not torch.allclose(other, want, atol=1e-3), "the switch to raw logits did nothing"


@pytest.mark.parametrize("kind, kwargs", CASES.values(), ids=CASES)
def test_weights_that_were_not_converted_are_told_of_the_converter(kind, kwargs):
    theirs, ours = (
        nn.Sequential(getattr(library, kind)(DIM, **kwargs)) for library in (predecessor, compat)
    )
    told = "^0.*: weights of colt5-attention, expected those that .*convert_colt5_attention_state"
    with pytest.warns(UserWarning, match=told), pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(theirs.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(ours.state_dict() | {"other.gamma": torch.ones(1)}, strict=False)


@torch.no_grad()
def test_the_predecessor_attends_to_padding():
    """Without a mask its last tokens see the padding of a length that its windows do not divide."""
    theirs, ours = pair(
        "ConditionalRoutedAttention", dim=DIM, num_heavy_tokens_q=7, num_heavy_tokens_kv=9, **SHAPE
    )
    x = tokens(1, N, DIM)
    right = theirs(x, mask=torch.ones(1, N, dtype=torch.bool))
    last = (N // (W // 2) - 1) * (W // 2)  # its windows of half the size look one ahead
    torch.testing.assert_close(theirs(x)[:, :last], right[:, :last])
    assert not torch.allclose(theirs(x)[:, last:], right[:, last:], atol=1e-3)
    torch.testing.assert_close(ours(x), right, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_predecessors_causal_attention_with_two_routes():
    """Its windows are samples of a batch, and with several routes it takes the mask of another
    sample."""
    shape = {**SHAPE, "num_heavy_tokens_q": W, "num_heavy_tokens_kv": 5, "num_routed_kv": 2}
    theirs, ours = pair("ConditionalRoutedAutoregressiveAttention", dim=DIM, **shape)
    x = tokens(1, 5 * W, DIM)
    windows = (
        torch.ones(5, 5, dtype=torch.bool).tril(-1)[1:].repeat_interleave(W, 1)
    )  # what 1 to 4 may see
    routed = theirs.kv_router(x.expand(4, -1, -1), num_tokens=5, mask=windows)
    right = windows.unsqueeze(1).expand(-1, 2, -1).gather(2, routed.indices)
    assert right.all() and not routed.routed_mask.all(), "it masks keys that the window may see"
    assert not torch.allclose(theirs(x), ours(x), atol=1e-2)


@pytest.mark.parametrize("soft", [False, True])
@torch.no_grad()
def test_equal_gradients_by_soft_gates(soft):
    """With the same iterations the gates are the predecessor's, and so is what the routers
    learn."""
    counts = {
        "num_heavy_tokens_q": 7,
        "num_heavy_tokens_kv": 9,
        "router_straight_through": not soft,
    }
    theirs, ours = pair("ConditionalRoutedAttention", dim=DIM, **counts, **SHAPE)
    x, mask = tokens(1, N, DIM), torch.ones(1, N, dtype=torch.bool)
    with torch.enable_grad():
        for module in (theirs, ours):
            (module(x, mask=mask) * tokens(1, N, DIM, seed=2)).sum().backward()
    for name in ("q_router.routing_token", "kv_router.routing_token"):
        want = theirs.get_parameter(name).grad
        got = ours.attend.get_parameter(name).grad
        assert want.norm() > 1e-4
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_image_attention_window_by_window():
    """It routes inside each window, so nothing crosses a window; ours, on each window alone, gives
    the same."""
    counts = {"num_heavy_tokens_q": 7, "num_heavy_tokens_kv": 9, "channel_first": True}
    theirs, ours = pair("ConditionalRoutedImageAttention", dim=DIM, **counts, **SHAPE)
    x = tokens(1, 2 * W, 3 * W, DIM).permute(0, 3, 1, 2)
    windows = x.unfold(2, W, W).unfold(3, W, W).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    apart = ours(windows).unflatten(0, (2, 3)).permute(2, 0, 3, 1, 4).reshape(1, DIM, 2 * W, 3 * W)
    torch.testing.assert_close(apart, theirs(x), atol=1e-5, rtol=0)

    other = x.clone()
    other[..., :W] = tokens(1, 2 * W, W, DIM, seed=3).permute(0, 3, 1, 2)
    assert torch.equal(theirs(other)[..., W:], theirs(x)[..., W:]), (
        "the predecessor's fault: no view of other windows"
    )
    assert not torch.allclose(ours(other)[..., W:], ours(x)[..., W:], atol=1e-3)
    with pytest.raises((TypeError, IndexError, RuntimeError)):
        theirs(
            x, num_heavy_tokens_q=W * W
        )  # as many as a window has: the crash of its README's examples
    with pytest.raises(Exception, match="not divisible|divide|Shape mismatch"):
        theirs(x[..., :-1])
    assert ours(x[..., :-1], num_heavy_tokens_q=W * W).isfinite().all()


@pytest.mark.parametrize("count", [7, 100])
@pytest.mark.parametrize("routes", [1, 2])
@torch.no_grad()
def test_cross_attention_from_the_pieces(routes, count):
    """Its own forward cannot run: it reads a name it never sets. What it meant is put together from
    its parts."""
    shape = {
        "num_tokens_q": 4,
        "num_tokens_kv": count,
        "kv_routing_tokens": routes,
        "dim_head": 8,
        "heads": 4,
    }
    theirs, ours = pair("ConditionalRoutedCrossAttention", dim=DIM, **shape)
    x, context = tokens(1, 11, DIM), tokens(1, N, DIM, seed=2)
    with pytest.raises(NameError, match="should_route_queries"):
        theirs(x, context=context)

    indices, scores, asking, _ = theirs.q_router(x, num_tokens=4)
    keys, gates = context, None
    if count < N:
        _, gates, keys, _ = theirs.kv_router(context, num_tokens=count)
    want = theirs.null_q_token.expand_as(x).clone()
    want[:, indices[0]] = theirs.heavy_attn(
        asking, context=keys, normalized_scores_kv=gates
    ) * scores.unsqueeze(-1)
    if count < N or routes == 1:  # a context that is not routed has one route there
        torch.testing.assert_close(ours(x, context=context), want, atol=1e-5, rtol=0)


VIT = {
    "image_size": 32,
    "patch_size": 4,
    "num_classes": 10,
    "dim": DIM,
    "depth": 2,
    "attn_num_heavy_tokens_q": 7,
    "attn_num_heavy_tokens_kv": 9,
    "attn_heavy_dim_head": 8,
    "attn_heavy_heads": 2,
    "attn_light_dim_head": 8,
    "attn_light_heads": 2,
    "attn_light_window_size": 8,
    "ff_num_heavy_tokens": 7,
    "ff_heavy_mult": 2,
    "ff_light_mult": 0.5,
}


@pytest.mark.parametrize(
    "size", [{}, {"image_size": (16, 128), "patch_size": (2, 16), "attn_num_routed_kv": 2}]
)
@torch.no_grad()
def test_vit(size):
    """One window that is the whole map: what routes in each of several windows there is not what
    routes here."""
    torch.manual_seed(0)
    theirs = predecessor.ConditionalRoutedViT(
        **{**VIT, **size}, router_kwargs=GATES, flash_attn=False
    )
    ours = compat.ConditionalRoutedViT(**{**VIT, **size}, router_kwargs=GATES)
    converted = convert_colt5_attention_state_dict(theirs.state_dict(), ours)
    ours.load_state_dict(converted)
    image = torch.randn(1, 3, *ours.image_size)
    want = theirs(image)
    torch.testing.assert_close(ours(image), want, atol=1e-5, rtol=0)
    assert not torch.allclose(normalizing(ours)(image), want, atol=1e-3)


@pytest.mark.parametrize(
    "kwargs", [{}, {"cosine_sim_routing": True, "cosine_sim_scale": 20.0}], ids=["raw", "cosine"]
)
def test_router(kwargs):
    theirs = predecessor.CoordinateDescentRouter(DIM, **GATES, **kwargs).double()
    ours = colt5_vision.CoordinateDescentRouter(DIM, **GATES, **kwargs).double()
    ours.load_state_dict(convert_colt5_attention_state_dict(theirs.state_dict(), ours))
    assert ours.normalize == bool(kwargs)
    x = tokens(3, N, DIM)
    got, want = ours(x, num_tokens=5), theirs(x, num_tokens=5)
    assert torch.equal(got.indices.squeeze(1).sort().values, want.indices.sort().values)


def network(make, norm):
    """A user's network around such modules."""
    attention = make.ConditionalRoutedAttention(
        DIM, num_heavy_tokens_q=7, num_heavy_tokens_kv=9, rotary_emb=True, **SHAPE
    )
    return nn.Sequential(
        nn.Linear(DIM, DIM), nn.ModuleDict({"attn": attention, "norm": norm}), nn.BatchNorm1d(DIM)
    )


@torch.no_grad()
def test_other_modules_of_ours_stay_as_they_are():
    """A network of which only one part comes from the predecessor; and one that is ours
    altogether."""
    heavy = {"num_heavy_tokens": 7}
    theirs = nn.ModuleList(
        [
            predecessor.ConditionalRoutedFeedForward(DIM, **heavy),
            colt5_vision.ConditionalRoutedFeedForward(DIM, **heavy),
        ]
    )
    ours = nn.ModuleList(
        [colt5_vision.ConditionalRoutedFeedForward(DIM, **heavy) for _ in range(2)]
    )
    ours.load_state_dict(convert_colt5_attention_state_dict(theirs.state_dict(), ours))
    assert [router.normalize for router in routers(ours)] == [False, True]
    assert [part.light_ff[0].eps for part in ours] == [1e-24, 1e-6]
    assert torch.equal(ours[1](tokens(2, N, DIM).float()), theirs[1](tokens(2, N, DIM).float()))
    converted = convert_colt5_attention_state_dict(theirs.state_dict(), ours)
    fresh = network(colt5_vision, nn.Identity())
    assert (
        convert_colt5_attention_state_dict(fresh.state_dict(), fresh).keys()
        == fresh.state_dict().keys()
    )
    assert all(router.normalize for router in routers(fresh))
    again = convert_colt5_attention_state_dict(converted, ours)
    assert all(again[name] is converted[name] for name in converted)


@pytest.mark.parametrize("dim", [64, 512])
def test_routers_learn_at_the_temperature_of_raw_logits(dim):
    """The page's advice, ``eps = dim ** 0.5``; at the default, 1, every gate of a wide module is
    capped."""
    kwargs = {"num_heavy_tokens_q": 64, "num_heavy_tokens_kv": 64, **SHAPE}
    x, moved = torch.randn(2, 512, dim, generator=torch.Generator().manual_seed(0)), []
    for eps in (dim**0.5, 1.0):
        torch.manual_seed(0)
        ours = colt5_vision.ConditionalRoutedAttention(
            dim, router_kwargs={"normalize": False, "eps": eps}, **kwargs
        )
        ours(x).square().sum().backward()
        moved.append(min(router.routing_token.grad.norm().item() for router in routers(ours)))
    assert moved[0] > 0.1 and (dim == 64 or moved[1] < 1e-3 * moved[0])


def test_a_network_that_holds_such_modules():
    """Entries of its own pass through: also a gamma of its own, and a weight of an RMSNorm of its
    own."""
    theirs = network(predecessor, nn.ModuleList([TheirNorm(DIM), nn.RMSNorm(DIM)]))
    ours = network(colt5_vision, nn.ModuleList([TheirNorm(DIM), nn.RMSNorm(DIM)]))
    state = theirs.state_dict()
    converted = convert_colt5_attention_state_dict(state, ours)
    assert converted.keys() == ours.state_dict().keys()
    ours.load_state_dict(converted)
    assert torch.equal(
        ours[1]["attn"].attend.heavy_attn.norm.weight, theirs[1]["attn"].heavy_attn.norm.gamma
    )
    assert state.keys() == theirs.state_dict().keys(), "the given dictionary is left alone"


@torch.no_grad()
def test_beside_a_module_that_it_never_had():
    """One softmax over both branches has no counterpart there; its entries pass through."""
    heavy = {"num_heavy_tokens": 7}
    fused = {"num_heavy_tokens_kv": 9, "fusion": "softmax", "rotary_emb": True}
    theirs, ours = (
        nn.ModuleList(
            [
                library.ConditionalRoutedFeedForward(DIM, **heavy),
                colt5_vision.ConditionalRoutedImageAttention(DIM, **fused),
            ]
        )
        for library in (predecessor, colt5_vision)
    )
    ours.load_state_dict(convert_colt5_attention_state_dict(theirs.state_dict(), ours))
    for name, value in theirs[1].state_dict().items():
        assert torch.equal(ours[1].state_dict()[name], value)
    assert [router.normalize for router in routers(ours)] == [False, True]


def test_causal_attention_with_routed_queries_keeps_their_router():
    """There are no equal outputs: there, a later token of a window can push a query out of it."""
    theirs, ours = pair(
        "ConditionalRoutedAutoregressiveAttention",
        dim=DIM,
        num_heavy_tokens_q=3,
        num_heavy_tokens_kv=5,
        **SHAPE,
    )
    assert torch.equal(ours.q_router.routing_token, theirs.q_router.routing_token)
    assert torch.equal(ours.null_q_token, theirs.null_q_token)


def test_what_does_not_fit_is_named():
    make = {"num_heavy_tokens_q": 7, "num_heavy_tokens_kv": 9}
    state = predecessor.ConditionalRoutedAttention(
        DIM, rotary_emb=True, **make, **SHAPE
    ).state_dict()

    def error_of(state, **kwargs):
        module = colt5_vision.ConditionalRoutedAttention(
            DIM, **{**make, **SHAPE, "rotary_emb": True, **kwargs}
        )
        with pytest.raises(
            ValueError, match="^state_dict: expected the weights of a ConditionalRouted"
        ) as error:
            convert_colt5_attention_state_dict(state, module)
        assert module.attend.kv_router.normalize, "nothing is switched by what fails"
        return str(error.value)

    assert "no place for rotary_emb.inv_freq" in error_of(state, rotary_emb=False)
    assert "no entry for light_attn.norm.weight" in error_of(
        {k: v for k, v in state.items() if "light" not in k}
    )
    assert "no place for light_attn.norm.weight" in error_of(state, has_light_attn=False)
    assert "no place for null_q_token, q_router.routing_token" in error_of(
        state, num_heavy_tokens_q=None, use_null_q_tokens=None
    )
    assert "heavy_attn.to_q.weight of shape (16, 16), expected (32, 16)" in error_of(
        state, heavy_heads=4
    )
    plain = predecessor.ConditionalRoutedAttention(DIM, **make, **SHAPE).state_dict()
    assert "no entry for rotary_emb.inv_freq" in error_of(plain)
    assert "of a wrapper?" not in error_of(plain, heavy_heads=4)
    wrapped = {f"module.{name}": value for name, value in state.items()}
    assert "names there begin with 'module', here with ''" in error_of(wrapped)
    block = {
        "num_heavy_attn_tokens_kv": 9,
        "num_heavy_attn_tokens_q": 7,
        "num_heavy_ff_tokens": 7,
        **SHAPE,
    }
    state = predecessor.ConditionalRoutedTransformerBlock(DIM, **block).state_dict()
    with pytest.raises(ValueError, match=r"no entry for conditional_attn\.rotary_emb\.inv_freq"):
        convert_colt5_attention_state_dict(
            state, colt5_vision.ConditionalRoutedTransformerBlock(DIM, rotary_emb=True, **block)
        )
    with pytest.raises(
        TypeError, match="^state_dict: expected a mapping of names to tensors, got Linear"
    ):
        convert_colt5_attention_state_dict(nn.Linear(2, 2), nn.Linear(2, 2))
