"""ConditionalRoutedViT: any size, masks, batches, dtypes, compile, export; its counterpart's
outputs: test_convert.py."""

import copy
import io
import pickle

import pytest
import torch

from colt5_vision.compat import ConditionalRoutedViT
from colt5_vision.positions import sincos_2d

SMALL = {
    "image_size": 32,
    "patch_size": 4,
    "num_classes": 5,
    "dim": 16,
    "depth": 2,
    "attn_num_heavy_tokens_q": 0.2,
    "attn_num_heavy_tokens_kv": 9,
    "attn_heavy_dim_head": 8,
    "attn_heavy_heads": 2,
    "attn_light_dim_head": 8,
    "attn_light_heads": 2,
    "attn_light_window_size": 4,
    "ff_num_heavy_tokens": 0.25,
    "ff_heavy_mult": 2,
    "ff_light_mult": 0.5,
}


def build(dtype=torch.float32, **kwargs):
    """The model with every parameter off its initial zero."""
    torch.manual_seed(0)
    model = ConditionalRoutedViT(**{**SMALL, **kwargs})
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def images(batch=3, height=32, width=32, dtype=torch.float32, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


@pytest.mark.parametrize("height, width", [(32, 32), (1, 1), (4, 40), (31, 21), (64, 48)])
def test_any_size(height, width):
    model, x = build(), images(2, height, width)
    out = model(x)
    assert out.shape == (2, 5) and out.isfinite().all()
    filled = torch.nn.functional.pad(x, (0, -width % 4, 0, -height % 4))
    assert torch.equal(model(filled), out)


def test_positions_matter_and_tell_rows_from_columns():
    table = sincos_2d(5, 7, 16, "cpu").flatten(0, 1)
    assert table.shape == (35, 16) and (torch.cdist(table, table) + torch.eye(35) > 0.1).all()
    assert sincos_2d(3, 3, 4, "cpu").isfinite().all()
    model, x = build(), images(1)
    assert not torch.allclose(model(x), model(x.mT), atol=1e-3)


def test_a_batch_gives_what_its_samples_give():
    model, x = build(torch.float64), images(dtype=torch.float64)
    mask = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2)) < 0.05
    for masks in ([None] * 3, mask.unsqueeze(1)):
        whole = model(x, mask=None if masks[0] is None else mask)
        each = [model(x[i : i + 1], mask=masks[i]) for i in range(3)]
        torch.testing.assert_close(whole, torch.cat(each))


@pytest.mark.parametrize("poison", [5.0, float("nan")])
def test_masked_pixels_are_never_read(poison):
    model, x = build(), images().requires_grad_()
    mask = torch.zeros(3, 32, 32, dtype=torch.bool)
    mask[0, :9, 5:20], mask[1, 30, 30] = True, True  # the third sample is masked wholly
    out = model(x, mask=mask)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    inside = mask.unsqueeze(1).expand_as(x)
    assert out.isfinite().all() and (grad[~inside] == 0).all() and (grad[inside] != 0).all()
    assert torch.equal(model(torch.where(mask.unsqueeze(1), x, poison), mask=mask), out)
    torch.testing.assert_close(model(x, mask=torch.ones(3, 32, 32, dtype=torch.bool)), model(x))


def test_arguments_reach_the_layers():
    given = {
        "attn_num_routed_kv": 2,
        "router_straight_through": False,
        "default_coor_descent_eps": 3.0,
    }
    kinds = {
        "learned": build(**given),
        "random": build(router="random"),
        "own": build(router_kwargs={"eps": 2.0}),
    }
    for attention, feed_forward in kinds["learned"].layers:
        attend = attention.attend
        routers = attend.q_router, attend.kv_router, feed_forward.router
        assert [(r.num_routing_tokens, r.straight_through, r.eps) for r in routers] == [
            (1, False, 3.0),
            (2, False, 3.0),
            (1, False, 3.0),
        ]
        assert attend.heavy_attn.heads == 2 and attend.light_attn.window_size == (4, 4)
    for kind, want in (("random", ("random", 1.0)), ("own", ("learned", 2.0))):
        for attention, feed_forward in kinds[kind].layers:
            for r in (attention.attend.q_router, attention.attend.kv_router, feed_forward.router):
                assert (r.kind, r.eps) == want and r.straight_through


def test_from_the_meta_device_to_initialised():
    torch.manual_seed(0)
    wide = {**SMALL, "dim": 256, "num_classes": 256}  # so that deviations of few numbers tell
    model = ConditionalRoutedViT(**wide, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    fresh = ConditionalRoutedViT(**wide)
    for (name, a), b in zip(model.named_parameters(), fresh.parameters()):
        assert a.std() == 0 == b.std() or 0.7 < a.std() / b.std() < 1.4, name
    assert model(images()).isfinite().all()


def test_nothing_follows_the_default_dtype():
    model, x, mask = build(), images(), torch.ones(3, 32, 32, dtype=torch.bool)
    want = model(x, mask)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model(x, mask), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_empty_batch():
    for mask in (None, torch.ones(0, 32, 32, dtype=torch.bool)):
        assert build()(images(0), mask=mask).shape == (0, 5)


def test_every_parameter_learns():
    model = build()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_dtypes(dtype, tolerance):
    model = build(
        dtype, attn_num_heavy_tokens_q=None, attn_num_heavy_tokens_kv=1.0, ff_num_heavy_tokens=1.0
    )
    want = copy.deepcopy(model).double()(images(dtype=dtype).double())
    out = model(images(dtype=dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        assert build()(images()).isfinite().all()


def test_copies_and_files():
    model, x = build(), images()
    want = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = ConditionalRoutedViT(**SMALL)
    fresh.load_state_dict(torch.load(file))
    for same in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), want)


def test_compile_and_export():
    model, x = build(depth=1).eval(), images()
    want = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
    program = torch.export.export(
        model, (x,), dynamic_shapes={"img": {0: torch.export.Dim("b", min=2)}}
    )
    torch.testing.assert_close(program.module()(images(5)), model(images(5)))


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("image_size", {"image_size": 30}),
        ("image_size", {"image_size": (32, 0)}),
        ("patch_size", {"patch_size": 0}),
        ("dim", {"dim": 18}),
        ("depth", {"depth": 0}),
        ("num_classes", {"num_classes": 0}),
        ("channels", {"channels": 1.5}),
        ("router_use_triton", {"router_use_triton": False}),
        ("flash_attn", {"flash_attn": False}),
    ],
)
def test_constructor_errors_name_the_argument(name, kwargs):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b.*: "):
        ConditionalRoutedViT(**{**SMALL, **kwargs})


@pytest.mark.parametrize(
    "name, call",
    [
        ("img", {"img": torch.randn(3, 32, 32)}),
        ("img", {"img": torch.randn(2, 4, 32, 32)}),
        ("img", {"img": torch.randn(2, 3, 0, 32)}),
        ("img", {"img": torch.ones(2, 3, 8, 8, dtype=torch.uint8)}),
        ("mask", {"mask": torch.ones(3, 8, 8, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(3, 32, 32)}),
    ],
)
def test_call_errors_name_the_argument(name, call):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
        build()(**{"img": images(), **call})
