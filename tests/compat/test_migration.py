"""docs/migration.md line by line: what colt5-attention 0.11.2 does, and what is done here
instead."""

import re
from pathlib import Path

import colt5_attention as predecessor
import pytest
import torch

import colt5_vision
from colt5_vision import compat

DIM, N = 16, 40
SHAPE = {
    "light_dim_head": 8,
    "light_heads": 2,
    "light_window_size": 8,
    "heavy_dim_head": 8,
    "heavy_heads": 2,
}
COUNTS = {"num_heavy_tokens_q": 7, "num_heavy_tokens_kv": 9}
TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "migration.md").read_text()
LINES, APPENDIX = (
    [
        line.strip("|").split(" | ")
        for line in part.splitlines()
        if line.startswith("| ") and not line.startswith(("| colt5-attention", "| line"))
    ]
    for part in PAGE.split("## Appendix: tests")
)


def both(name, *args, seed=0, **kwargs):
    made = []
    for library in (predecessor, compat):
        torch.manual_seed(seed)
        made.append(getattr(library, name)(*args, **kwargs))
    return made


def tokens(batch=3, num=N, seed=1):
    return torch.randn(batch, num, DIM, generator=torch.Generator().manual_seed(seed))


def test_every_line_is_in_the_appendix():
    assert len(LINES) > 30
    assert [line[0] for line in LINES] == [line[0] for line in APPENDIX]


@pytest.mark.parametrize(("line", "tests"), APPENDIX)
def test_every_line_names_a_test_that_exists(line, tests):
    names = re.findall(r"`(\w+\.py)::(\w+)`", tests)
    assert names, f"no test: {line}"
    for file, test in names:
        (path,) = TESTS.rglob(file)
        assert f"def {test}(" in path.read_text(), f"{file} has no {test}"


def test_the_pages_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})  # noqa: S102


@torch.no_grad()
def test_several_routes_stay_in_their_sample():
    theirs, ours = both("ConditionalRoutedAttention", DIM, num_routed_kv=2, **COUNTS, **SHAPE)
    x = tokens()
    assert not torch.allclose(theirs(x)[1:2], theirs(x[1:2]), atol=1e-2), (
        "it gathers from another sample"
    )
    torch.testing.assert_close(ours(x)[1:2], ours(x[1:2]))


@torch.no_grad()
def test_the_router_takes_the_largest_logits():
    """Its gates saturate at 1, and a top-k of ones is any of them."""
    theirs, ours = both("CoordinateDescentRouter", 512)
    x = torch.randn(2, 4096, 512, generator=torch.Generator().manual_seed(1))

    def overlap(indices, logits):
        best = logits.topk(512).indices
        return (indices.unsqueeze(2) == best.unsqueeze(1)).any(-1).float().mean().item()

    assert overlap(theirs(x, num_tokens=512).indices, x @ theirs.routing_token[0]) < 0.7
    assert overlap(ours(x, num_tokens=512).indices[:, 0], ours.logits(x)[:, 0]) == 1


@torch.no_grad()
def test_logits_are_of_tokens_of_unit_norm():
    """There, ``x · w``: the longest tokens win, or lose, by their length alone. ``normalize=False``
    is that."""
    _, ours = both("CoordinateDescentRouter", DIM)
    x = tokens()
    torch.testing.assert_close(ours.logits(x), ours.logits(7 * x))
    raw = compat.CoordinateDescentRouter(DIM, normalize=False)
    torch.testing.assert_close(raw.logits(7 * x)[:, 0], 7 * x @ raw.routing_token[0])


@torch.no_grad()
def test_masked_tokens_take_no_slots():
    theirs, ours = both("CoordinateDescentRouter", 64)
    x = torch.randn(8, 256, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(8, 256, generator=torch.Generator().manual_seed(2)) < 0.5
    assert (mask.sum(1) > 100).all()
    assert (theirs(x, num_tokens=100, mask=mask).routed_mask.sum(1) < 100).any(), (
        "valid ones are left"
    )
    routed = ours(x, num_tokens=100, mask=mask)
    assert routed.mask.all() and mask.gather(1, routed.indices[:, 0]).all()


@torch.no_grad()
def test_masks():
    """There, a masked token still gets an output, and image attention takes no mask of a map."""
    theirs, ours = both("ConditionalRoutedAttention", DIM, **COUNTS, **SHAPE)
    x, mask = tokens(), torch.arange(N).expand(3, -1) < 30
    assert (theirs(x, mask=mask)[~mask] != 0).any() and (ours(x, mask=mask)[~mask] == 0).all()
    theirs, ours = both(
        "ConditionalRoutedImageAttention", DIM, channel_first=True, **COUNTS, **SHAPE
    )
    with pytest.raises(RuntimeError, match="size of tensor"):
        theirs(torch.randn(1, DIM, 16, 16), mask=torch.ones(1, 16, 16, dtype=torch.bool))
    assert (
        ours(torch.randn(1, DIM, 16, 16), mask=torch.ones(1, 16, 16, dtype=torch.bool))
        .isfinite()
        .all()
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ConditionalRoutedAttention", "ConditionalRoutedFeedForward"])
def test_autocast(kind):
    kwargs = {"num_heavy_tokens": 7} if "Feed" in kind else {**COUNTS, **SHAPE}
    theirs, ours = both(kind, DIM, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtypes match"):
            theirs(tokens())
        assert ours(tokens()).isfinite().all()


@torch.no_grad()
def test_null_tokens_start_at_0():
    """There, a token that is not routed is given noise, several times what the branch gives to one
    that is."""
    theirs, ours = both("ConditionalRoutedAttention", DIM, **COUNTS, **SHAPE)
    assert theirs.null_q_token.std() > 0.5 and (ours.attend.null_q_token == 0).all()
    assert theirs.heavy_attn.null_kv.std() > 0.5 and (ours.attend.heavy_attn.null_key.kv == 0).all()
    theirs.heavy_attn.null_kv.zero_()
    assert theirs.heavy_attn(tokens()).std() < 0.25 * theirs.null_q_token.std()


@torch.no_grad()
def test_blocks_of_a_router():
    theirs, ours = both("CoordinateDescentRouter", DIM, route_block_size=10)
    with pytest.raises(IndexError, match="out of bounds"):
        theirs(tokens(num=43), num_tokens=9)
    assert theirs(tokens(num=19), num_tokens=9).indices.max() < 10, (
        "what does not fill a block is dropped"
    )
    indices = ours(tokens(num=43), num_tokens=9).indices
    assert torch.equal(
        torch.bincount(indices[0, 0] // 10, minlength=5), torch.tensor([2, 2, 2, 2, 1])
    )


def test_learned_routing_tokens_means_what_it_says():
    theirs, ours = both("CoordinateDescentRouter", DIM, learned_routing_tokens=True)
    assert theirs.routing_token is None and ours.routing_token.shape == (1, DIM)
    theirs, ours = both("CoordinateDescentRouter", DIM, learned_routing_tokens=False)
    assert theirs.routing_token is not None and ours.routing_token is None
    assert ours(tokens(), num_tokens=5, routing_tokens=torch.randn(3, DIM)).indices.shape == (
        3,
        1,
        5,
    )


@torch.no_grad()
def test_what_a_router_returns():
    """There (indices, scores, routed_tokens, routed_mask), without a dimension of routes where
    there is one."""
    theirs, ours = both("CoordinateDescentRouter", DIM)
    x = tokens()
    got, want = ours(x, num_tokens=5), theirs(x, num_tokens=5)
    assert want._fields == ("indices", "scores", "routed_tokens", "routed_mask")
    assert got._fields == ("indices", "gates", "log_weights", "mask")
    assert got.indices.shape == (3, 1, 5) and want.indices.shape == (3, 5)
    rows = torch.arange(3).unsqueeze(1)
    assert torch.equal(want.routed_tokens, x[rows, want.indices])
    # its route_back(src, routed_tokens, indices)
    index = got.indices[:, 0].unsqueeze(-1).expand(-1, -1, DIM)
    back = x.scatter(1, index, torch.zeros(3, 5, DIM))
    assert ((back == 0).all(-1).sum(1) == 5).all()
    # as many slots as tokens, or more: there no indices at all
    assert theirs(x, num_tokens=N).indices is None
    assert torch.equal(ours(x, num_tokens=N).indices[0, 0].sort().values, torch.arange(N))


@torch.no_grad()
def test_random_routing_is_a_kind_of_router():
    """There ``random_route=True`` with a call, which fails without a mask."""
    theirs, _ = both("CoordinateDescentRouter", DIM)
    with pytest.raises(TypeError, match="bad operand"):
        theirs(tokens(), num_tokens=5, random_route=True)
    ours = compat.CoordinateDescentRouter(DIM, router="random")
    assert torch.equal(ours(tokens(), num_tokens=5).indices, ours(tokens(), num_tokens=5).indices)
    drawn = [
        ours(tokens(), num_tokens=5, generator=torch.Generator().manual_seed(i)).indices
        for i in (0, 1)
    ]
    assert not torch.equal(*drawn)


def test_gates_are_exact_unless_iterations_are_asked_for():
    """There 20 iterations from eps 4 to .03, which do not reach k; here the gates sum to 9/8 of k,
    at eps 1."""
    theirs, ours = both("CoordinateDescentRouter", DIM, straight_through=False)
    assert (theirs.n_iters, theirs.eps, theirs.eps_init, theirs.eps_decay) == (20, 0.03, 4.0, 0.7)
    assert (ours.n_iters, ours.eps, ours.eps_init, ours.eps_decay) == (None, 1.0, None, 1.0)
    soft = ours.soft_gates(ours.logits(tokens()), 8)
    torch.testing.assert_close(soft.sum(-1), torch.full((3, 1), 9.0))
    gates = predecessor.coor_descent(
        100 * ours.logits(tokens(num=4096)).detach(), n_iters=20, k=9, eps=0.03
    )
    assert (gates.sum(-1) > 20).all()


def test_gates_are_soft_only_where_every_token_queries():
    def straight(module):
        kinds = (predecessor.CoordinateDescentRouter, colt5_vision.CoordinateDescentRouter)
        found = {part.straight_through for part in module.modules() if isinstance(part, kinds)}
        return found.pop() if len(found) == 1 else found

    layer = {**COUNTS, **SHAPE}
    block = {f"num_heavy_attn_{name[10:]}": count for name, count in COUNTS.items()}
    block |= {"num_heavy_ff_tokens": 4, **SHAPE}
    for name, kwargs in (
        ("ConditionalRoutedAttention", layer),
        ("ConditionalRoutedImageAttention", layer),
        ("ConditionalRoutedTransformerBlock", block),
        ("ConditionalRoutedAutoregressiveAttention", layer),
        ("ConditionalRoutedFeedForward", {"num_heavy_tokens": 4}),
    ):
        theirs, ours = both(name, DIM, **kwargs)
        assert straight(theirs) is True and straight(ours) is True
        for given in (True, False):
            assert (
                straight(getattr(compat, name)(DIM, router_straight_through=given, **kwargs))
                is given
            )
    layer, block = (
        {key: value for key, value in kwargs.items() if not key.endswith("tokens_q")}
        for kwargs in (layer, block)
    )
    assert straight(compat.ConditionalRoutedAttention(DIM, **layer)) is False
    assert straight(compat.ConditionalRoutedImageAttention(DIM, **layer)) is False
    assert straight(compat.ConditionalRoutedImageAttention(DIM, **layer, fusion="softmax")) is True
    block = compat.ConditionalRoutedTransformerBlock(DIM, **block)
    assert straight(block.conditional_attn) is False and straight(block.conditional_ff) is True
    assert straight(compat.ConditionalRoutedCrossAttention(DIM, num_tokens_kv=4)) is True
    assert straight(compat.ConditionalRoutedAutoregressiveAttention(DIM, **layer)) is True


def test_the_scale_of_cosine_routing():
    theirs, ours = both("CoordinateDescentRouter", 256, cosine_sim_routing=True)
    assert theirs.cosine_sim_scale == 8 and ours.cosine_sim_scale == 16


def test_counts_may_be_shares_and_differ_from_sample_to_sample():
    ours = compat.ConditionalRoutedAttention(DIM, num_heavy_tokens_kv=1 / 4, **SHAPE)
    each = ours(tokens(), num_heavy_tokens_kv=torch.tensor([1, 5, 10]))
    torch.testing.assert_close(each[1:2], ours(tokens()[1:2], num_heavy_tokens_kv=5))
    with pytest.raises((TypeError, RuntimeError)):
        both("ConditionalRoutedAttention", DIM, **COUNTS, **SHAPE)[0](
            tokens(), num_heavy_tokens_kv=torch.tensor([1, 5, 10])
        )


def test_every_token_may_query():
    """There a router of queries always chooses; here it does only where its number is given."""
    ours = compat.ConditionalRoutedAttention(DIM, num_heavy_tokens_kv=9, **SHAPE)
    assert ours.attend.q_router is None and ours(tokens()).shape == (3, N, DIM)
    with pytest.raises(TypeError, match="num_heavy_tokens_q"):
        predecessor.ConditionalRoutedAttention(DIM, num_heavy_tokens_kv=9, **SHAPE)


def test_kernels_are_not_asked_for():
    """``use_triton``, ``router_use_triton``, ``use_flash_attn``, ``flash_attn``: True or
    nothing."""
    layer = {"dim": DIM, **COUNTS, **SHAPE}
    for make, kwargs in (
        (compat.ConditionalRoutedAttention, layer),
        (compat.ConditionalRoutedImageAttention, layer),
        (compat.ConditionalRoutedAutoregressiveAttention, layer),
        (
            compat.ConditionalRoutedCrossAttention,
            {"dim": DIM, "num_tokens_q": 4, "num_tokens_kv": 4},
        ),
    ):
        make(**kwargs, use_triton=True, use_flash_attn=True)
        with pytest.raises(ValueError, match="^use_triton: .*COLT5_VISION_BACKEND=eager"):
            make(**kwargs, use_triton=False)
        with pytest.raises(ValueError, match=r"^use_flash_attn: .*sdpa_kernel"):
            make(**kwargs, use_flash_attn=False)
    compat.ConditionalRoutedFeedForward(DIM, num_heavy_tokens=4, use_triton=True)
    with pytest.raises(ValueError, match="^use_triton: "):
        compat.ConditionalRoutedFeedForward(DIM, num_heavy_tokens=4, use_triton=False)

    vit = {
        "image_size": 32,
        "patch_size": 4,
        "num_classes": 2,
        "dim": DIM,
        "depth": 1,
        "ff_num_heavy_tokens": 4,
    }
    vit |= {
        "ff_heavy_mult": 2,
        "ff_light_mult": 1,
        **{f"attn_{name}": value for name, value in (COUNTS | SHAPE).items()},
    }
    compat.ConditionalRoutedViT(**vit, router_use_triton=True, flash_attn=True)
    with pytest.raises(ValueError, match="^router_use_triton: .*COLT5_VISION_BACKEND=eager"):
        compat.ConditionalRoutedViT(**vit, router_use_triton=False)
    with pytest.raises(ValueError, match=r"^flash_attn: .*sdpa_kernel"):
        compat.ConditionalRoutedViT(**vit, flash_attn=False)


def test_what_only_a_schedule_or_a_cosine_uses():
    for kwargs in ({"eps_init": 4.0}, {"eps_decay": 0.7}, {"cosine_sim_scale": 8}):
        predecessor.CoordinateDescentRouter(DIM, **kwargs)
        with pytest.raises(ValueError, match=f"{next(iter(kwargs))}.*: "):
            compat.CoordinateDescentRouter(DIM, **kwargs)
    compat.CoordinateDescentRouter(DIM, n_iters=20, eps_init=4.0, eps_decay=0.7)
    compat.CoordinateDescentRouter(DIM, cosine_sim_routing=True, cosine_sim_scale=8)


def test_windows_between_which_tokens_are_seen_by_nobody():
    """There only its README warns of a heavy window that is wider than the light one."""
    counts = {
        "num_heavy_tokens_q": 4,
        "num_heavy_tokens_kv": 4,
        "light_window_size": 8,
        "heavy_window_size": 24,
    }
    predecessor.ConditionalRoutedAutoregressiveAttention(DIM, **counts)
    with pytest.raises(ValueError, match="^heavy_window_size: .* would be seen by neither branch"):
        compat.ConditionalRoutedAutoregressiveAttention(DIM, **counts)


def test_arguments_without_a_meaning_are_refused():
    sizes = [
        {
            name: value.shape
            for name, value in predecessor.ConditionalRoutedCrossAttention(**kwargs)
            .state_dict()
            .items()
        }
        for kwargs in (
            {"dim": DIM, "num_tokens_q": 4, "num_tokens_kv": 4, "num_sets_kv": sets}
            for sets in (1, 3)
        )
    ]
    assert sizes[0] == sizes[1]
    compat.ConditionalRoutedCrossAttention(DIM, num_tokens_kv=4, num_sets_kv=1)
    with pytest.raises(ValueError, match="^num_sets_kv: .* use kv_routing_tokens"):
        compat.ConditionalRoutedCrossAttention(DIM, num_tokens_kv=4, num_sets_kv=2)
    with pytest.raises(ValueError, match="^triton_checkpoint_segments: .*nothing to recompute"):
        compat.CoordinateDescentRouter(DIM, triton_checkpoint_segments=4)


def test_image_attention_is_channel_first_with_a_window_of_16():
    theirs, ours = both("ConditionalRoutedImageAttention", DIM, **COUNTS)
    assert (theirs.channel_first, theirs.light_window_size) == (False, 128)
    assert (ours.channel_first, ours.attend.light_attn.window_size) == (True, (16, 16))
