"""The layers and the router of compat: colt5_attention's arguments, what they become in the core,
and what is refused."""

import copy
import pickle
import subprocess
import sys

import colt5_attention as predecessor
import pytest
import torch

import colt5_vision
from colt5_vision import compat

DIM, N = 16, 43
HEADS = {"light_dim_head": 8, "light_heads": 2, "heavy_dim_head": 8, "heavy_heads": 2}
COUNTS = {"num_heavy_tokens_q": 7, "num_heavy_tokens_kv": 9}
LAYERS = {  # what each needs
    "ConditionalRoutedFeedForward": {"num_heavy_tokens": 7},
    "ConditionalRoutedAttention": {**COUNTS, **HEADS, "light_window_size": 8},
    "ConditionalRoutedImageAttention": {**COUNTS, **HEADS, "light_window_size": 4},
    "ConditionalRoutedAutoregressiveAttention": {**COUNTS, **HEADS, "light_window_size": 8},
    "ConditionalRoutedCrossAttention": {
        "num_tokens_q": 7,
        "num_tokens_kv": 9,
        "dim_head": 8,
        "heads": 2,
    },
    "ConditionalRoutedTransformerBlock": {
        "num_heavy_attn_tokens_q": 7,
        "num_heavy_attn_tokens_kv": 9,
        "num_heavy_ff_tokens": 7,
        **HEADS,
        "light_window_size": 8,
    },
}
ROUTED = [name for name in LAYERS if "Autoregressive" not in name]
every_layer = pytest.mark.parametrize("name", LAYERS)
every_routed_layer = pytest.mark.parametrize("name", ROUTED)


def make(name, library=compat, **kwargs):
    torch.manual_seed(0)
    return getattr(library, name)(DIM, **{**LAYERS[name], **kwargs})


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(name):
    """What a layer is called with."""
    if "Image" in name:
        return (randn(2, DIM, 6, 7),)
    x = randn(2, N, DIM)
    return (x, randn(2, 60, DIM, seed=2)) if "Cross" in name else (x,)


def routers(module):
    kind = colt5_vision.CoordinateDescentRouter
    return [part for part in module.modules() if isinstance(part, kind)]


def test_all_names_of_the_predecessor_are_here():
    names = [name for name in vars(predecessor) if name[0] != "_" and name[0].isupper()]
    assert len(names) == 8
    for name in [*names, "topk", "coor_descent"]:
        assert name in compat.__all__ and callable(getattr(compat, name))
    from colt5_vision.compat.coor_descent import coor_descent
    from colt5_vision.compat.topk import topk
    from colt5_vision.compat.transformer_block import ConditionalRoutedAttention
    from colt5_vision.compat.vit import ConditionalRoutedViT

    assert compat.topk is topk and compat.coor_descent is coor_descent
    assert compat.ConditionalRoutedAttention is ConditionalRoutedAttention
    assert compat.ConditionalRoutedViT is ConditionalRoutedViT


def test_the_core_knows_nothing_of_it():
    code = "import sys, colt5_vision; sys.exit('colt5_vision.compat' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ("use_triton", "use_flash_attn", "num_sets_kv", "route_block_size", "method"):
        for layer in LAYERS:
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                make(layer, colt5_vision, **{name: None})
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            colt5_vision.CoordinateDescentRouter(DIM, **{name: None})


@every_layer
@torch.no_grad()
def test_a_layer_is_the_cores(name):
    """The same weights for the same seed, the same names of weights, the same outputs."""
    ours, core = make(name), make(name, colt5_vision)
    assert isinstance(ours, type(core))
    assert ours.state_dict().keys() == core.state_dict().keys()
    for a, b in zip(ours.parameters(), core.parameters()):
        assert torch.equal(a, b)
    want = core(*inputs(name))
    for same in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(same) is type(ours) and torch.equal(same(*inputs(name)), want)


@every_layer
def test_from_the_meta_device_to_initialised(name):
    module = make(name, device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    module.init_weights()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert module(*inputs(name)).isfinite().all()


@every_layer
def test_switches(name):
    """True or nothing."""
    switches = ["use_triton"] + ["use_flash_attn"] * ("FeedForward" not in name)
    instead = {
        "use_triton": "COLT5_VISION_BACKEND=eager",
        "use_flash_attn": "torch.nn.attention.sdpa_kernel",
    }
    make(name, **dict.fromkeys(switches, True))
    make(name, **dict.fromkeys(switches))
    make(name, router_kwargs={"use_triton": True, "triton_checkpoint_segments": None})
    for switch in switches:
        with pytest.raises(ValueError, match=f"^{switch}: .*{instead[switch]}"):
            make(name, **{switch: False})
        for value in ("yes", 1):
            with pytest.raises(TypeError, match=f"^{switch}: expected None or True, got "):
                make(name, **{switch: value})
    with pytest.raises(ValueError, match="^use_triton: "):
        make(name, router_kwargs={"use_triton": False})
    with pytest.raises(ValueError, match="^triton_checkpoint_segments: "):
        make(name, router_kwargs={"triton_checkpoint_segments": 4})


@pytest.mark.parametrize(
    "name", ["ConditionalRoutedFeedForward", "ConditionalRoutedTransformerBlock"]
)
def test_positional_masks(name):
    """In the predecessor's order: mask, then counts."""
    module, x, mask = make(name), randn(2, N, DIM), torch.arange(N).expand(2, -1) < 30
    counts = [3] if "FeedForward" in name else [3, 4, 5]
    names = [count for count in LAYERS[name] if count.startswith("num_heavy")]
    want = module(x, mask=mask, **dict(zip(names, counts)))
    assert torch.equal(module(x, mask, *counts), want)
    assert not torch.equal(module(x, mask), want)


@every_routed_layer
def test_a_method_reaches_the_routers(name):
    plain = make(name, router_straight_through=False)
    module = make(
        name, router_straight_through=False, router_kwargs={"method": "cumulative_softmax"}
    )
    assert all(type(router) is compat.CoordinateDescentRouter for router in routers(module))
    assert {router.method for router in routers(module)} == {"cumulative_softmax"}
    assert {router.method for router in routers(plain)} == {"coordinate_descent"}
    for a, b in zip(plain.parameters(), module.parameters()):
        assert torch.equal(a, b)
    out = module(*inputs(name))
    assert not torch.allclose(out, plain(*inputs(name)), atol=1e-4)
    out.square().sum().backward()
    assert all((router.routing_token.grad != 0).any() for router in routers(module))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(*inputs(name)), module(*inputs(name)))
    with pytest.raises(ValueError, match="^method: expected one of"):
        make(name, router_kwargs={"method": "best"})


def test_a_method_of_the_keys_alone():
    module = make(
        "ConditionalRoutedCrossAttention",
        router_kwargs={"eps": 2.0},
        kv_router_kwargs={"method": "gumbel_sinkhorn"},
    )
    assert (module.q_router.method, module.q_router.eps) == ("coordinate_descent", 2.0)
    assert (module.kv_router.method, module.kv_router.eps) == ("gumbel_sinkhorn", 2.0)


@pytest.mark.parametrize("option", [{"method": "gumbel_sinkhorn"}, {"route_block_size": 3}])
def test_what_needs_the_whole_sequence_is_refused_where_the_future_is_not_known(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"^router_kwargs\['{name}'\]: needs the whole sequence"):
        make("ConditionalRoutedAutoregressiveAttention", router_kwargs=option)
    harmless = {"method": "coordinate_descent", "route_block_size": None}
    make("ConditionalRoutedAutoregressiveAttention", router_kwargs=harmless)


@pytest.mark.parametrize("num", [40, 43])
@torch.no_grad()
def test_route_block_size_is_a_cell_of_a_line(num):
    x = randn(2, num, DIM)
    torch.manual_seed(0)
    blocks = compat.CoordinateDescentRouter(DIM, route_block_size=10)
    torch.manual_seed(0)
    cells = colt5_vision.CoordinateDescentRouter(DIM, cell_size=(1, 10))
    got, want = blocks(x, num_tokens=8), cells(x, num_tokens=8, grid_size=(1, num))
    assert torch.equal(got.indices, want.indices)
    torch.manual_seed(0)
    free = compat.CoordinateDescentRouter(DIM)
    assert not torch.equal(got.indices, free(x, num_tokens=8).indices)


@every_routed_layer
@torch.no_grad()
def test_route_block_size_of_a_layer(name):
    module = make(name, router_kwargs={"route_block_size": 10})
    assert all(router.cell_size == (1, 10) for router in routers(module))
    free = make(name)(*inputs(name))
    assert not torch.allclose(module(*inputs(name)), free, atol=1e-3)


@pytest.mark.parametrize("count", [5, 9])
def test_every_block_of_the_context_has_its_share_and_none_is_dropped(count):
    module = make("ConditionalRoutedCrossAttention", route_block_size=10, num_tokens_kv=count)
    assert module.q_router.cell_size is None and module.kv_router.cell_size == (1, 10)
    x, context = randn(2, 11, DIM), randn(2, N, DIM, seed=2)
    routed = module.kv_router(context, num_tokens=count, grid_size=(1, N)).indices[:, 0]
    shares = torch.stack([(routed // 10 == block).sum(-1) for block in range(5)], -1)
    assert (shares[:, :4] >= count // 5).all() and (shares.sum(-1) == count).all()
    read = torch.autograd.functional.jacobian(lambda c: module(x[:1], c).sum(), context[:1])
    read = read.abs().amax(-1)[0]
    assert set(routed[0].tolist()) <= set((read > 0).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"route_block_size": 0},
        {"route_block_size": 1.5},
        {"route_block_size": 4, "router_kwargs": {"cell_size": 4}},
        {"route_block_size": 4, "router_kwargs": {"route_block_size": 8}},
        {"route_block_size": 4, "kv_router_kwargs": {"cell_size": (1, 4)}},
        {"kv_router_kwargs": {"cell_size": (1, 4), "route_block_size": 4}},
    ],
)
def test_blocks_that_are_refused(kwargs):
    with pytest.raises((ValueError, TypeError), match="^route_block_size: "):
        make("ConditionalRoutedCrossAttention", **kwargs)


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("route_block_size", {"route_block_size": 0}),
        ("route_block_size", {"route_block_size": 4, "cell_size": 4}),
        ("use_triton", {"use_triton": False}),
        ("triton_checkpoint_segments", {"triton_checkpoint_segments": 4}),
    ],
)
def test_errors_of_the_router_name_the_argument(name, kwargs):
    with pytest.raises(ValueError, match=f"^{name}: "):
        compat.CoordinateDescentRouter(DIM, **kwargs)


@torch.no_grad()
def test_arguments_of_a_call_without_a_meaning():
    module, x = compat.CoordinateDescentRouter(DIM), randn(2, N, DIM)
    want = module(x, num_tokens=5)
    same = module(x, num_tokens=5, random_route=False, keep_one_route_dim=True)
    assert torch.equal(same.indices, want.indices)
    with pytest.raises(ValueError, match="^random_route: give router='random' to the module"):
        module(x, num_tokens=5, random_route=True)
    with pytest.raises(ValueError, match=r"^keep_one_route_dim: .*\(B, R, K\)"):
        module(x, num_tokens=5, keep_one_route_dim=False)
    causal = make("ConditionalRoutedAutoregressiveAttention")
    assert torch.equal(causal(x, random_route=False), causal(x))
    with pytest.raises(ValueError, match="^random_route: "):
        causal(x, random_route=True)


def test_positional_arguments_of_the_router_come_in_the_predecessors_order():
    given = (DIM, False, 20, 1.5, 0.1, 0.5, 2.0, 3)
    theirs, ours = (library.CoordinateDescentRouter(*given) for library in (predecessor, compat))
    names = ("straight_through", "n_iters", "fetch_k_ratio", "eps", "eps_decay", "eps_init")
    for name in (*names, "num_routing_tokens"):
        assert getattr(ours, name) == getattr(theirs, name)
