"""route_attention on every family: the original at 1.0, no trace after unroute, nothing touched by
an error."""

import copy
import io

import pytest
import timm
import torch

from colt5_vision import route_attention, routed_layers, unroute_attention
from colt5_vision.checks import ROUTERS
from colt5_vision.swap import probes
from colt5_vision.swap.report import NEVER_ROUTED
from tests.support.one_token import one_token
from tests.support.swap_cases import (
    CASES,
    build,
    every_family,
    gradients,
    image,
    routed,
    some,
    trace,
    unrouted,
)


@every_family
def test_every_key_routed_is_the_original_and_fewer_differ(case, monkeypatch):
    monkeypatch.setattr(
        probes, "_PROBES", 2
    )  # of maps as small as these every token would be a probe, and exact
    model, x = build(case), image(case)
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(routed(model, 1.0)(x), expected, rtol=1e-10, atol=1e-10)
        found = routed(unrouted(model))(x)
    assert (found - expected).abs().max() > 1e-3
    assert found.isfinite().all()


@every_family
def test_every_key_routed_is_the_original_in_single_precision(case):
    model, x = build(case, torch.float32), image(case, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(routed(model, 1.0)(x), expected, rtol=1e-5, atol=1e-5)


@every_family
def test_gradients_are_the_originals_when_every_key_is_routed(case):
    model, x = build(case), image(case)
    expected = gradients(model, x)
    assert all(grad.any() for grad in expected.values())
    found = gradients(routed(model, 1.0), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_family
def test_gradients_reach_every_parameter_when_few_keys_are_routed(case):
    found = gradients(routed(build(case)), image(case))
    assert [
        n
        for n, grad in found.items()
        if grad is None or not grad.any() or not grad.isfinite().all()
    ] == []


@every_family
def test_unroute_leaves_no_trace(case):
    model, x = build(case), image(case)
    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", model)
    embed.register_forward_hook(lambda *_: None)  # the user's own stays
    with torch.no_grad():
        expected = model(x)
        before, state = trace(model), {k: v.clone() for k, v in model.state_dict().items()}
        routed(model, num_heavy_tokens_q=0.5)
        assert trace(model) != before
        assert list(model.state_dict()) == list(state)
        model(x)
        unroute_attention(model)
        assert trace(model) == before
        assert len(embed._forward_hooks) == 1
        assert torch.equal(model(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@every_family
def test_a_batch_gives_what_its_samples_give(case):
    model, x = routed(build(case), num_heavy_tokens_q=0.5), image(case, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-9, atol=1e-9
        )


@some("vit", "dinov2-registers", "eva02", "beit", "sam", "volo")
def test_copies_and_pickles_route_on_their_own(case):
    model, x = routed(build(case), router="learned"), image(case)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert list(routed_layers(twin)) == list(routed_layers(model))
            assert torch.equal(twin(x), expected)
            unroute_attention(twin)
            assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_runs_and_keeps_the_mode_and_dtype(router):
    case = CASES["vit"]
    model, x = build(case, torch.bfloat16).train(), image(case, dtype=torch.bfloat16)
    routed(model, router=router)
    assert all(layer.attention.router == router for layer in routed_layers(model).values())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model(x).isfinite().all()


@some("vit", "dinov2-registers", "eva02")
def test_grouped_with_all_keys_kept_is_full_attention(case):
    model, x = build(case), image(case)
    with torch.no_grad():
        want = model(x)
        few = routed(model, router="grouped", num_heavy_tokens_kv=3)(x)
        assert few.isfinite().all() and not torch.allclose(few, want, rtol=1e-4)
        unroute_attention(model)
        routed(model, router="grouped", num_heavy_tokens_kv=1.0)
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
        assert all(layer.calls.routed for layer in routed_layers(model).values())
        unroute_attention(model)
        assert torch.equal(model(x), want)


@some("sam", "beit")
@pytest.mark.filterwarnings("ignore:.*never routed")
def test_grouped_leaves_a_bias_of_pairs_exact_and_tells(case):
    model, x = build(case), image(case)
    with torch.no_grad():
        want = model(x)
        routed(model, router="grouped", num_heavy_tokens_kv=3)
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
    reasons = [layer.calls.exact for layer in routed_layers(model).values()]
    assert all("bias of pairs" in next(iter(counted)) for counted in reasons)


def test_routers_choose_differently():
    case = CASES["vit"]
    x = image(case)
    with torch.no_grad():
        outs = [
            routed(build(case), router=r)(x)
            for r in ("sampled", "mean_query", "random", "grid", "window")
        ]
        assert torch.equal(routed(build(case), router="learned")(x), outs[0])
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(outs) for b in outs[:i])


def test_layers_are_chosen_by_index_negative_index_and_name():
    case = CASES["sam"]
    names = ["blocks.1.attn", "blocks.2.attn"]  # the first block attends in windows
    assert list(routed_layers(routed(build(case)))) == names
    for layers, expected in (
        ([0], names[:1]),
        ([-1], names[1:]),
        (["blocks.1.attn"], names[:1]),
        ((1, -2), names),
    ):
        model = routed(build(case), layers=layers)
        assert sorted(routed_layers(model)) == expected
    model = routed(build(CASES["vit"]), layers=iter([1]))
    assert list(routed_layers(model)) == ["blocks.1.attn"]


def make(name, **args):
    return lambda: timm.create_model(name, **args).eval()


VIT = ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 5})
BAD = {
    "swin": (
        make("swin_tiny_patch4_window7_224"),
        {},
        ValueError,
        r"WindowAttention: it attends in windows of its own \(12\)",
    ),
    "cait": (make("cait_xxs24_224"), {}, ValueError, "TalkingHeadAttn: it mixes heads"),
    "resnet": (make("resnet18"), {}, ValueError, "no attention over a map that is known"),
    "pit": (make("pit_ti_224"), {}, ValueError, "no patch embedding around it"),
    "differential": (make("vit_dlittle_patch16_reg1_gap_256"), {}, ValueError, "DiffAttention"),
    "small": (None, {"min_tokens": 1000}, ValueError, "196 tokens: fewer tokens than min_tokens"),
    "config": (None, {"config": {}}, TypeError, "config: expected a RoutedAttentionConfig"),
    "unknown": (None, {"window": 3}, TypeError, "window: expected an argument among"),
    "router": (None, {"router": "oracle"}, ValueError, "router: expected one of .* got 'oracle'"),
    "window": (None, {"window_size": 0}, ValueError, "window_size"),
    "count": (None, {"num_heavy_tokens_kv": 0}, ValueError, "num_heavy_tokens_kv"),
    "share": (None, {"num_heavy_tokens_kv": 1.5}, ValueError, "num_heavy_tokens_kv"),
    "queries": (None, {"num_heavy_tokens_q": -1}, ValueError, "num_heavy_tokens_q"),
    "index": (None, {"layers": [0, 2]}, ValueError, r"layers: expected indices in \[0, 2\), got 2"),
    "negative": (None, {"layers": [-3]}, ValueError, "layers: expected indices"),
    "name": (
        None,
        {"layers": ["blocks.0"]},
        ValueError,
        r"layers: 'blocks\.0' is no layer that can be routed; there are blocks\.0\.attn",
    ),
    "bool": (
        None,
        {"layers": [True]},
        TypeError,
        "layers: expected a list of names, patterns or indices",
    ),
    "float": (
        None,
        {"layers": [1.0]},
        TypeError,
        "layers: expected a list of names, patterns or indices",
    ),
    "one index": (
        None,
        {"layers": 0},
        TypeError,
        "layers: expected a list of names, patterns or indices",
    ),
    "nested": (
        None,
        {"layers": [[0]]},
        TypeError,
        "layers: expected a list of names, patterns or indices",
    ),
    "empty": (None, {"layers": []}, ValueError, "layers: expected at least one"),
    "string": (None, {"layers": "blocks.0.attn"}, TypeError, "layers: .*'blocks.0.attn'"),
}


@pytest.mark.parametrize(("build_model", "how", "error", "match"), BAD.values(), ids=BAD)
def test_an_error_leaves_the_model_untouched(build_model, how, error, match):
    model = (build_model or make(*VIT[:1], **VIT[1]))()
    before = trace(model)
    with pytest.raises(error, match=match):
        routed(model, **how)
    assert trace(model) == before
    with pytest.raises(ValueError, match="nothing is routed"):
        unroute_attention(model)


def test_routed_twice_is_an_error_and_keeps_the_first():
    model, x = routed(build(CASES["vit"]), layers=[0]), image(CASES["vit"])
    with torch.no_grad():
        expected, before = model(x), trace(model)
        with pytest.raises(ValueError, match="routed already"):
            routed(model, layers=[1])
        assert trace(model) == before
        assert torch.equal(model(x), expected)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module or .*got str"):
        routed("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("extra", "call", "reason"),
    [
        ({}, {"is_causal": True}, "causal attention"),
        ({"attn_drop_rate": 0.5}, {}, "dropout of attention weights"),
        ({"patch_drop_rate": 0.5}, {}, "18 keys are not a map of 5 x 7 tokens"),
    ],
)
def test_what_cannot_be_routed_is_exact_counted_and_told(extra, call, reason):
    """Causal attention, and what training drops."""
    model, x = build(CASES["vit"], **extra).train(), image(CASES["vit"])
    torch.manual_seed(0)
    expected = model(x, **call)
    report = route_attention(model, window_size=3, num_heavy_tokens_kv=0.25, min_tokens=0)
    torch.manual_seed(0)
    match = f"blocks.0.attn {NEVER_ROUTED}: .*{reason}.* the first of 2 layers"
    with pytest.warns(RuntimeWarning, match=match) as told:
        assert torch.equal(model(x, **call), expected)
    assert len([one for one in told if NEVER_ROUTED in str(one.message)]) == 1
    assert report.calls.routed == 0
    assert [reason in found for found in report.calls.exact] == [True]
    assert report.calls.exact.total() == 2


def test_calls_are_counted_and_a_layer_that_was_routed_once_warns_no_more(recwarn):
    model, x = build(CASES["vit"]), image(CASES["vit"])
    report = route_attention(model, window_size=3, num_heavy_tokens_kv=0.25, min_tokens=0)
    assert list(report) == ["blocks.0.attn", "blocks.1.attn"] and report.exact == {}
    assert report["blocks.0.attn"] == 35
    with torch.no_grad():
        model(x)
        model(x, is_causal=True)
    assert report.calls.routed == 2 and report.calls.exact == {"causal attention": 2}
    assert routed_layers(model)["blocks.0.attn"].calls is report.layer_calls["blocks.0.attn"]
    assert "2 routed, 2 exact" in str(report) and "2 exact: causal attention" in str(report)
    assert "not called" not in str(report)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    report.reset_calls()
    assert report.calls.routed == 0 and not report.calls.exact


def test_small_maps_stay_exact_without_a_word(recwarn):
    model, x = build(CASES["vit"]), image(CASES["vit"])
    with torch.no_grad():
        expected = model(x)
        report = route_attention(model, sample_size=(640, 640), min_tokens=1024)
        assert report == {"blocks.0.attn": 1600, "blocks.1.attn": 1600}
        assert torch.equal(model(x), expected)
    assert report.calls.exact == {"fewer tokens than min_tokens": 2}
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_fused_attention_can_be_switched_off_and_is_given_back():
    model, x = build(CASES["vit"]), image(CASES["vit"])
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        expected = model(x)
        report = route_attention(model, window_size=3, num_heavy_tokens_kv=0.25, min_tokens=0)
        found = model(x)
        model.blocks[0].attn.fused_attn = False  # by anyone: routing goes on
        assert torch.equal(model(x), found)
        assert report.calls.routed == 4
        unroute_attention(model)
        assert torch.equal(model(x), expected)
    assert not any(block.attn.fused_attn for block in model.blocks)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("sam", False), ("beit", False), ("relpos-class", False), ("sam", True)],
)
def test_a_forward_past_the_hooks_is_stock(name, compiled):
    """Attributes are the layer's own while no call of it is routed; a graph's stay until undone."""
    torch.compiler.reset()
    model, x = build(CASES[name]), image(CASES[name])
    attend = model.blocks[-1].attn.forward
    shape = (5, 7, 64) if name == "sam" else (36, 64)
    tokens = torch.randn(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        full, expected = model(x), attend(tokens)
        report = route_attention(model, window_size=3, num_heavy_tokens_kv=1.0, min_tokens=0)
        if compiled:
            model.blocks[-1].compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(x), full, rtol=1e-9, atol=1e-9)
        assert torch.equal(attend(tokens), expected) != compiled
        assert report.calls.routed == len(report) - compiled and not report.calls.exact
        unroute_attention(model)
        assert torch.equal(attend(tokens), expected)
        torch.testing.assert_close(model(x), full, rtol=1e-9, atol=1e-9)


def test_beit_at_another_size_than_its_table_is_an_error_until_resized():
    case = CASES["beit"]
    model, x = routed(build(case), 1.0), image(case, size=(112, 80))
    model.patch_embed.strict_img_size = False
    with torch.no_grad():
        with pytest.raises(
            ValueError, match="5 x 7 tokens of the relative position table.*set_input_size"
        ):
            model(x)  # as many tokens, another map
        model.set_input_size((112, 80))
        found = model(x)
        torch.testing.assert_close(found, unrouted(model)(x), rtol=1e-9, atol=1e-9)


unmixed = {name: case for name, case in CASES.items() if case.size in ((80, 112), (70, 98))}
del unmixed["sam"], unmixed["volo"]  # others attend before its first routed layer


@pytest.mark.parametrize("case", unmixed.values(), ids=unmixed)
def test_the_map_lies_where_the_embedding_says(case, monkeypatch):
    model, x, patch = build(case), image(case, batch=1), case.size[0] // 5

    @torch.no_grad()
    def with_a_patch_changed(place):
        changed = x.clone()
        if place is not None:
            row, column = (patch * n for n in place)
            changed[..., row : row + patch, column : column + patch] += 5
        model(changed)

    site, layers = one_token(model, with_a_patch_changed, (5, 7), monkeypatch)
    assert site.before == model.num_prefix_tokens and layers == len(routed_layers(model))


def test_hieras_tokens_are_found_in_their_units():
    """timm's own way back to a raster says where each token is."""
    case, seen = CASES["hiera"], []
    model = routed(build(case), 1.0)
    for layer in routed_layers(model).values():
        original = layer.route
        layer.route = lambda *args, original=original: seen.append(args[1].site) or original(*args)
    with torch.no_grad():
        model(image(case))
    names = list(routed_layers(model))
    assert names == ["blocks.3.attn", "blocks.4.attn", "blocks.6.attn"]
    for name, site in zip(names, seen):
        place = torch.arange(site.tokens).view(1, -1, 1)
        raster = model.reroll(place, int(name.split(".")[1])).flatten()
        order = torch.arange(site.tokens) if site.order is None else site.order[0]
        assert torch.equal(raster, order)
