"""Routed timm models at sizes that change, with masks, checkpointing, features, mixed precision,
compiled, exported."""

import copy

import pytest
import timm
import torch
from timm.models import vision_transformer
from timm.models.volo import VOLO
from torch._dynamo.testing import CompileCounterWithBackend

from colt5_vision import routed_layers, unroute_attention
from colt5_vision.swap.report import NEVER_ROUTED
from colt5_vision.swap.site import image_site
from tests.support.marks import further
from tests.support.swap_cases import CASES, build, close, gradients, image, routed, some, unrouted

dynamic = some("vit", "deit3", "dinov2-registers", "rope", "pe", "eva02", "dinov3")
SIZES = ((5, 8), (8, 5), (3, 3), (1, 9), (8, 5))  # tokens


def at(case, size, **how):
    patch = 14 if case.size == (70, 98) else 16
    return image(case, size=(patch * size[0], patch * size[1]), **how)


@dynamic
def test_sizes_change_between_calls(case):
    model, original, every = routed(build(case)), build(case), routed(build(case), 1.0)
    with torch.no_grad():
        for size in SIZES:
            x = at(case, size)
            close(model(x), routed(build(case))(x))
            close(every(x), original(x))


@some("sam")
def test_sam_takes_any_map(case):
    model, every = build(case), routed(build(case), 1.0)
    with torch.no_grad():
        for size in SIZES:
            close(every(at(case, size)), model(at(case, size)))


def test_transposed_sizes_are_not_confused():
    """The reshaped map of the wrong size gives another result: the test above can tell."""
    case = CASES["vit"]
    model, x = routed(build(case)), at(case, (5, 8))
    with torch.no_grad():
        expected = model(x)
        hook = model.patch_embed._forward_hooks["colt5_vision.entrance"]
        hook.read = lambda embed, given, output: image_site(8, 5, before=1)
        assert (model(x) - expected).abs().max() > 1e-4


@some("vit", "dinov2-registers", "eva02")
def test_sizes_no_patch_divides(case):
    extra = {"dynamic_img_pad": True} if "eva" not in case.name else {}
    model, x = build(case, **extra), image(case, size=(75, 101) if extra else (70, 84))
    with torch.no_grad():
        close(routed(copy.deepcopy(model), 1.0)(x), model(x))
        assert routed(model)(x).isfinite().all()


def test_a_copy_and_its_original_see_their_own_sizes():
    case = CASES["vit"]
    model = routed(build(case))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wide, high = model(at(case, (5, 8))), model(at(case, (8, 5)))
        tokens = model.patch_embed(at(case, (5, 8)))
        assert tokens.shape[1:3] == (5, 8)
        assert torch.equal(twin(at(case, (8, 5))), high)
        assert torch.equal(twin(at(case, (5, 8))), wide)


@some("vit", "eva02", "beit")
def test_a_block_on_its_own_does_not_know_its_map(case):
    model, x = routed(build(case)), image(case)
    tokens = torch.randn(2, 35 + model.num_prefix_tokens, 64, dtype=torch.float64)
    with torch.no_grad():
        calls = routed_layers(model)["blocks.0.attn"].calls
        with pytest.warns(RuntimeWarning, match=f"blocks.0.attn {NEVER_ROUTED}: the layer ran"):
            exact = model.blocks[0](tokens)  # no forward yet
        model(x)
        assert torch.equal(model.blocks[0](tokens), exact)  # the size of another forward
        model.patch_embed(x)
        model.blocks[0](tokens[:, :-1])
        assert model(x).isfinite().all()
        prefix = model.num_prefix_tokens
        assert calls.routed == 2
        assert calls.exact == {
            "the layer ran outside of a call of the model": 1,
            "the layer ran a second time, or outside of a call of the model": 1,
            f"{34 + prefix} keys are not a map of 5 x 7 tokens and its other tokens": 1,
        }


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [("vit", False), ("dinov3", False), ("beit", False), ("sam", False), ("sam", True)],
)
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    case = CASES[name]
    expected = gradients(routed(build(case)).train(), image(case))
    model = routed(build(case)).train()
    model.set_grad_checkpointing()
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        for _ in range(2):
            close(gradients(model, image(case).requires_grad_()), expected)
    finally:
        timm.layers.set_reentrant_ckpt(before)


def test_checkpointing_with_sizes_that_change_between_backwards():
    case = CASES["vit"]
    model, plain = routed(build(case)).train(), routed(build(case)).train()
    model.set_grad_checkpointing()
    for size in SIZES:
        close(gradients(model, at(case, size)), gradients(plain, at(case, size)))


def test_reentrant_checkpointing_does_not_guess_the_size():
    model = routed(build(CASES["vit"])).train()
    model.set_grad_checkpointing()
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    try:
        out = model(image(CASES["vit"]).requires_grad_())
        with pytest.raises(ValueError, match="use_reentrant=False"):
            out.sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(before)


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_tells_forwards_of_transposed_sizes_apart(every, monkeypatch):
    """Several losses in flight, backward in another order than forward, forwards in between."""
    original = vision_transformer.checkpoint_seq
    monkeypatch.setattr(
        vision_transformer,
        "checkpoint_seq",
        lambda *a, **kw: original(*a, **{**kw, "every": every}),
    )
    case = CASES["vit"]
    grads = []
    for checkpointing in (False, True):
        model = routed(build(case)).train()
        model.set_grad_checkpointing(checkpointing)
        first, second = (model(at(case, (5, 8)) * scale).square().sum() for scale in (1, 2))
        first.backward()
        third = model(at(case, (8, 5))).square().sum()
        second.backward()
        third.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    close(*grads)


def test_checkpointing_keeps_several_forwards_of_different_lengths():
    case = CASES["vit"]
    model, plain = routed(build(case)).train(), routed(build(case)).train()
    model.set_grad_checkpointing()
    losses = {}
    for m in (model, plain):
        first = m(at(case, (5, 8))).square().sum() + m(at(case, (3, 3))).square().sum()
        with torch.no_grad():
            m(at(case, (8, 5)))  # an evaluation in between needs no backward
        first.backward()
        losses[m] = {name: p.grad for name, p in m.named_parameters()}
    close(losses[model], losses[plain])


@some("vit", "dinov2-registers", "eva02", "beit", "sam", "siglip")
def test_features_are_the_originals_when_every_key_is_routed(case):
    model, every, x = build(case), routed(build(case), 1.0), image(case)
    with torch.no_grad():
        close(every.forward_features(x), model.forward_features(x))
        close(every.forward_intermediates(x, indices=2), model.forward_intermediates(x, indices=2))
        few = routed(build(case)).forward_intermediates(x, indices=1, intermediates_only=True)[-1]
        expected = model.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
        assert (few - expected).abs().max() > 1e-3


@some("vit", "beit", "sam")
def test_features_only_models_are_routed_through_their_backbone(case):
    model, x = build(case, features_only=True, out_indices=(0, 1), num_classes=0), image(case)
    with torch.no_grad():
        expected = model(x)
        for part in (model, model.model):
            routed(part, 1.0)
            close(model(x), expected)
            if part is model:
                unroute_attention(part)
        routed(unrouted(model.model))
        assert (model(x)[-1] - expected[-1]).abs().max() > 1e-3


def masks(length, heads):
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn(2, heads, length, length, generator=generator, dtype=torch.float64)
    keep = (draw > -0.5) | torch.eye(length, dtype=torch.bool)
    keys = keep[:, :1, -1:].clone()
    keys[..., 0] = True
    yield from (
        keys,
        keys[:1],
        keys[0, 0],
        keep[0, 0],
        keep[:, :1],
        keep,
        draw[0, 0],
        draw[:, :1],
        draw,
    )
    yield draw[:, :1, :1]  # a bias of keys
    yield draw.masked_fill(~keep, float("-inf"))
    yield ~torch.eye(length, dtype=torch.bool)[0].expand(2, 1, 1, -1)  # not the first prefix token


@pytest.mark.parametrize("index", range(12))
@some("vit", "dinov2-registers", "rope", "dinov3")
def test_masks_are_the_originals_when_every_key_is_routed(case, index):
    model, every, x = build(case), routed(build(case), 1.0), image(case, batch=2)
    mask = list(masks(35 + model.num_prefix_tokens, 2))[index]
    with torch.no_grad():
        expected = model(x, attn_mask=mask)
        assert (expected - model(x)).abs().max() > 1e-3
        close(every(x, attn_mask=mask), expected)


def test_a_masked_key_is_not_read():
    case = CASES["vit"]
    model, x = routed(build(case)), image(case)
    keep = torch.ones(2, 1, 1, 36, dtype=torch.bool)
    keep[..., 20:25] = False
    with torch.no_grad():
        attention, tokens = model.blocks[0].attn, torch.randn(2, 36, 64, dtype=torch.float64)
        model.patch_embed(x)
        expected = attention(tokens, attn_mask=keep)
        tokens[:, 20:25] = 1e3
        model.patch_embed(x)
        found = attention(tokens, attn_mask=keep)
    seen = keep[0, 0, 0]
    assert torch.equal(found[:, seen], expected[:, seen])


@some("vit", "eva02", "beit", "sam", "volo")
def test_training_mode_draws_the_same_random_numbers(case):
    extra = {"drop_path_rate": 0.5} | ({} if case.name is VOLO else {"proj_drop_rate": 0.2})
    model, x = build(case, **extra).train(), image(case)
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(model(x).detach())
        if not routed_layers(model):
            for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
                norm.reset_running_stats()
            routed(model, 1.0)
    close(*outs)
    assert not torch.equal(model(x), outs[0])


@some("vit", "dinov2-registers", "eva02", "dinov3", "beit", "sam", "volo")
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_half_precision(case, how):
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    model, x = build(case, dtype), image(case, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        expected = model(x)
        found = routed(model, 1.0)(x)
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()
        out = routed(unrouted(model))(x)
        assert out.isfinite().all()
        out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def shallow(case, **extra):
    """One routed layer, fast to trace."""
    only = {"global_attn_indexes": (0,)} if "sam" in case.name else {}
    return build(case, depth=1, **only, **extra)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("vit", {"num_heavy_tokens_q": 0.5}),
        ("sam", {}),
        *further(("eva02", {"router": "learned"}), ("beit", {})),
    ],
)
def test_compiles_whole_with_gradients(name, how):
    """As exactly as the stock model: a graph of torch 2.11 has position embeddings that are
    resampled a little otherwise."""
    x, errors = image(CASES[name]), []
    for model in (shallow(CASES[name]), routed(shallow(CASES[name]), **how)):
        torch.compiler.reset()
        expected = gradients(model, x)
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        close(out, model(x))
        model.zero_grad()
        out.square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        beyond = {n: (found[n] - g).abs() - 1e-9 * (1 + g.abs()) for n, g in expected.items()}
        errors.append({n: max(0.0, error.max().item()) for n, error in beyond.items()})
    stock, ours = errors
    assert all(ours[n] <= 2 * stock[n] for n in stock), ours


def test_blocks_compiled_one_by_one_follow_the_size():
    torch.compiler.reset()
    case = CASES["vit"]
    model, eager = routed(shallow(case)), routed(shallow(case))
    model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((5, 8), (8, 5), (5, 8)):
            close(model(at(case, size)), eager(at(case, size)))


def test_compiled_with_dynamic_shapes_makes_no_more_graphs_than_the_original():
    """timm's own code makes a graph for each image size."""
    case, counts = CASES["vit"], []
    for model in (shallow(case), routed(shallow(case))):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        fast = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        with torch.no_grad():
            for size in ((5, 8), (8, 5)):
                close(fast(at(case, size)), model(at(case, size)))
        counts.append(counter.frame_count)
    assert counts[1] == counts[0]


@pytest.mark.parametrize(
    ("name", "strict"), [("vit", True), ("sam", False), *further(("vit", False), ("eva02", False))]
)
def test_exports(name, strict):
    case = CASES[name]
    model = routed(shallow(case))
    with torch.no_grad():
        program = torch.export.export(model, (image(case),), strict=strict).module()
        close(program(image(case, seed=4)), model(image(case, seed=4)))


@pytest.mark.parametrize("router", ["sampled", *further("mean_query", "grid", "window")])
def test_exports_for_any_size(router):
    """Of 64 tokens at least, as many as there are probes."""
    model, auto = routed(shallow(CASES["vit"]), router=router), torch.export.Dim.AUTO
    with torch.no_grad():
        how = {"dynamic_shapes": ({0: auto, 2: auto, 3: auto},)}
        program = torch.export.export(model, (at(CASES["vit"], (9, 11)),), **how).module()
        for size in ((9, 11), (8, 12), (13, 7)):
            close(program(at(CASES["vit"], size)), model(at(CASES["vit"], size)))


def test_grouped_exports_for_one_size_alone():
    """Of open ones the exporter did not come to an end."""
    model, auto = routed(shallow(CASES["vit"]), router="grouped"), torch.export.Dim.AUTO
    x = at(CASES["vit"], (9, 11))
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: auto},)).module()
        close(program(x[:1]), model(x[:1]))
        with pytest.raises(ValueError, match="expected fixed height and width"):
            torch.export.export(model, (x,), dynamic_shapes=({2: auto, 3: auto},))
        close(program(x), model(x))


def test_two_embeddings_before_the_blocks_are_not_mixed_up():
    case = CASES["vit"]
    model = routed(build(case))
    calls = routed_layers(model)["blocks.0.attn"].calls
    with torch.no_grad():
        expected = model(at(case, (8, 5)))
        tokens = model.patch_embed(at(case, (5, 8))).flatten(1, 2)
        model.patch_embed(at(case, (8, 5)))
        tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        found = model.blocks[0](tokens)
        assert calls.exact == {"two maps of as many tokens were embedded in a row": 1}
        assert torch.equal(model(at(case, (8, 5))), expected)
        assert torch.equal(unrouted(model).blocks[0](tokens), found)
