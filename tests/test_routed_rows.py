"""gather_normalize and gated_scatter_add_ on the CPU, and the sum fusion that is made of them."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import rms_norm

from colt5_vision import ConditionalRoutedFeedForward, ConditionalRoutedImageAttention
from colt5_vision.attention import attend_windows
from colt5_vision.branches import own_output
from colt5_vision.ops import gated_scatter_add_, gather_normalize
from colt5_vision.ops.routed_rows import reference
from colt5_vision.router import gather_tokens

HEADS = {"light_dim_head": 8, "light_heads": 2, "light_window_size": 4, "heavy_dim_head": 8, "heavy_heads": 2}
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distinct(*shape, limit, seed=3):
    return randn(*shape[:-1], limit, seed=seed).argsort(-1)[..., : shape[-1]]


def scatter_inputs(dtype=torch.float64):
    floats = (randn(2, 9, 5), randn(2, 4, 5, seed=1), randn(2, 4, seed=2), randn(5, seed=4))
    out, rows, gates, null = (t.to(dtype) for t in floats)
    return out, rows, distinct(2, 4, limit=9), gates, null


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4)])
def test_gather_is_rms_norm_of_the_rows(dtype, shape):
    x, weight, indices = randn(2, 9, 5, dtype=dtype), randn(5, seed=1), distinct(*shape, limit=9)
    got = gather_normalize(x, indices, weight, eps=1e-3)
    want = torch.stack([rms_norm(x[b, indices[b]].double(), (5,), weight, 1e-3) for b in range(2)])
    assert got.dtype == dtype and got.shape == (*shape, 5)
    torch.testing.assert_close(got, want.to(dtype))
    for other in FLOATS:  # whatever nn.RMSNorm makes of mixed dtypes, also under autocast
        rows = gather_tokens(x, indices)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                norm = rms_norm(rows, (5,), weight.to(other), 1e-3)
                assert torch.equal(gather_normalize(x, indices, weight.to(other), eps=1e-3), norm)


@pytest.mark.parametrize("with_gates, with_null", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_scatter_is_a_loop_over_rows(with_gates, with_null, dtype):
    out, rows, indices, gates, null = scatter_inputs(dtype)
    want = out.double()
    for b in range(2):
        for k in range(4):
            add = rows[b, k].double() * (gates[b, k].double() if with_gates else 1)
            want[b, indices[b, k]] += add - (null.double() if with_null else 0)
    got = gated_scatter_add_(out, rows, indices, gates=gates if with_gates else None, null=null if with_null else None)
    assert got is out
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-6)  # products are rounded as well
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=0)


def test_gates_stay_wide():
    """float32 gates of half rows are not rounded before the product."""
    out, rows, indices, gates, _ = scatter_inputs(torch.bfloat16)
    gates = 1 + 1e-3 * gates.float()
    want = out.double()
    want.scatter_add_(1, indices.unsqueeze(-1).expand(-1, -1, 5), rows.double() * gates.double().unsqueeze(-1))
    assert torch.allclose(gated_scatter_add_(out * 0, rows, indices, gates=gates).double(), want - out.double(), 4e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated):
    out, rows, indices, gates, null = scatter_inputs()
    inputs = [t.requires_grad_() for t in (out, rows, gates, null)]

    def scatter(out, rows, gates, null):
        return gated_scatter_add_(out * 1, rows, indices, gates=gates if gated else None, null=null)

    assert torch.autograd.gradcheck(scatter, inputs)
    assert torch.autograd.gradgradcheck(scatter, inputs)
    grad = randn(2, 9, 5, seed=5)
    want = torch.autograd.grad(scatter(*inputs), inputs, grad, allow_unused=True)
    found = reference.gated_scatter_add_backward(grad, rows, indices, gates if gated else None)
    for a, b in zip(found, want[1:]):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_gather_gradients():
    x, weight, indices = randn(2, 9, 5).requires_grad_(), randn(5, seed=1).requires_grad_(), distinct(2, 3, 4, limit=9)

    def call(x, weight):
        return gather_normalize(x, indices, weight)

    assert torch.autograd.gradcheck(call, (x, weight)) and torch.autograd.gradgradcheck(call, (x, weight))
    grad = randn(2, 3, 4, 5, seed=5)
    out, scale = reference.gather_normalize_forward(x, indices, weight, 1e-6, torch.float64)
    torch.testing.assert_close(out, call(x, weight))
    want = torch.autograd.grad(call(x, weight), (x, weight), grad)
    found = reference.gather_normalize_backward(grad, x.detach(), indices, weight.detach(), scale.detach())
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b)


INT = torch.int64


@pytest.mark.parametrize(
    "error, name, call",
    [
        (TypeError, "x", {"x": None}),
        (ValueError, "x", {"x": randn(9, 5)}),
        (TypeError, "indices", {"indices": [1]}),
        (TypeError, "indices", {"indices": torch.zeros(2, 3, dtype=torch.int32)}),
        (ValueError, "indices", {"indices": torch.zeros(3, 3, dtype=INT)}),
        (ValueError, "indices", {"indices": torch.zeros(2, dtype=INT)}),
        (ValueError, "indices", {"indices": torch.zeros(2, 1, 1, 3, dtype=INT)}),
        (ValueError, "indices", {"indices": torch.full((2, 3), 9)}),
        (ValueError, "indices", {"indices": torch.full((2, 3), -1)}),
        (ValueError, "indices", {"indices": torch.zeros(2, 3, dtype=INT, device="meta")}),
        (TypeError, "weight", {"weight": None}),
        (ValueError, "weight", {"weight": randn(4)}),
        (ValueError, "weight", {"weight": randn(5).to("meta")}),
        (ValueError, "eps", {"eps": -1.0}),
        (ValueError, "backend", {"backend": "cuda"}),
    ],
)
def test_gather_errors_name_the_argument(error, name, call):
    given = {"x": randn(2, 9, 5), "indices": distinct(2, 3, limit=9), "weight": randn(5), **call}
    with pytest.raises(error, match=rf"^{name}: expected "):
        gather_normalize(given.pop("x"), given.pop("indices"), given.pop("weight"), **given)


@pytest.mark.parametrize(
    "error, name, call",
    [
        (TypeError, "out", {"out": None}),
        (ValueError, "out", {"out": randn(9, 5)}),
        (TypeError, "rows", {"rows": torch.ones(2, 4, 5, dtype=INT)}),
        (ValueError, "rows", {"rows": randn(2, 3, 5)}),
        (ValueError, "indices", {"indices": distinct(2, 1, 4, limit=9)}),
        (ValueError, "indices", {"indices": torch.full((2, 4), 9)}),
        (ValueError, "gates", {"gates": randn(2, 4, 1)}),
        (ValueError, "gates", {"gates": randn(2, 4).to("meta")}),
        (ValueError, "null", {"null": randn(1, 5)}),
        (TypeError, "null", {"null": 0.0}),
        (ValueError, "backend", {"backend": "cuda"}),
    ],
)
def test_scatter_errors_name_the_argument(error, name, call):
    names = ("out", "rows", "indices", "gates", "null")
    given = {**dict(zip(names, scatter_inputs())), **call}
    with pytest.raises(error, match=rf"^{name}: expected "):
        gated_scatter_add_(given.pop("out"), given.pop("rows"), given.pop("indices"), **given)


def test_meta_and_backends():
    out, rows, indices, gates, null = scatter_inputs()
    with pytest.raises(RuntimeError, match="^gather_normalize: backend 'triton' cannot run: "):
        gather_normalize(out, indices, null, backend="triton")
    with pytest.raises(RuntimeError, match="^gated_scatter_add_: backend 'triton' cannot run: "):
        gated_scatter_add_(out, rows, indices, backend="triton")
    out, rows, indices, gates, null = (t.to("meta") for t in (out, rows, indices, gates, null))
    assert gather_normalize(out, indices, null).shape == rows.shape
    assert gated_scatter_add_(out, rows, indices, gates=gates, null=null) is out


def some_module(**options):
    torch.manual_seed(0)
    options = {"num_heavy_tokens_q": 6, "num_heavy_tokens_kv": 5, "num_routed_kv": 2, **options}
    module = ConditionalRoutedImageAttention(16, **HEADS, **options)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.double()


def composed(module, x):
    """The sum fusion as it was composed of plain operators: the null token added to the map, an outer scatter."""
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    q, kv = module.q_router(tokens, num_tokens=6), module.kv_router(tokens, num_tokens=5)
    light = module.light_attn(
        tokens, functools.partial(attend_windows, grid_size=(9, 7), window_size=module.window_size, mask=None)
    )
    heavy = module.heavy_attn(tokens, q.indices[:, 0], kv.indices, key_gates=kv.gates)
    heavy = heavy * q.gates[:, 0].unsqueeze(-1) - module.null_q_token
    out = (light + module.null_q_token).scatter_add(1, q.indices[:, 0].unsqueeze(-1).expand_as(heavy), heavy)
    return out.unflatten(1, (9, 7)).permute(0, 3, 1, 2)


def gradients(module, x, call):
    x = x.detach().requires_grad_()
    out = call(x)
    return out.detach(), torch.autograd.grad((out * randn(*out.shape, seed=9)).sum(), [x, *module.parameters()])


@pytest.mark.parametrize("straight_through", [True, False])
def test_the_sum_fusion_is_what_it_was(straight_through):
    module, x = some_module(router_straight_through=straight_through), randn(2, 16, 9, 7, seed=7)
    assert module.null_q_token.abs().max() > 0.01
    torch.testing.assert_close(gradients(module, x, module), gradients(module, x, lambda x: composed(module, x)))
    with torch.no_grad():
        torch.testing.assert_close(module(x), composed(module, x))


def test_no_pass_over_the_map_beside_the_light_branch():
    """No addition of the null token to the map, no copy of it for the scatter; none of its gradient in backward."""
    module, x = some_module(channel_first=False), randn(2, 9, 7, 16, seed=7)  # a channels-first one is made contiguous
    grad = randn(2, 9, 7, 16, seed=9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        module(x).backward(grad)
    on_maps = [e.name for e in profile.events() if e.input_shapes and e.input_shapes[0] in ([2, 63, 16], [126, 16])]
    assert on_maps.count("aten::scatter_add_") == 1
    assert not {"aten::add", "aten::add_", "aten::clone", "aten::scatter_add"} & set(on_maps)
    assert not any("CopySlices" in event.name for event in profile.events())


class Adapter(nn.Module):
    """What an adapter library puts in place of a Linear: its output is needed by its backward."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).exp()


def test_a_light_branch_that_needs_its_output():
    """Adapters and hooks keep working: their output is copied before it is changed."""
    module, x = some_module(), randn(2, 16, 9, 7, seed=7)
    module.light_attn.to_out = Adapter(module.light_attn.to_out)
    torch.testing.assert_close(gradients(module, x, module), gradients(module, x, lambda x: composed(module, x)))
    seen = []
    for name in ("light_attn", "light_attn.to_out"):
        module = some_module()
        module.get_submodule(name).register_forward_hook(lambda _, inputs, out: seen.append((out, out.clone())))
        module(x)
        assert torch.equal(*seen.pop())
    module = some_module()
    plain = gradients(module, x, module)
    module.light_attn.register_full_backward_hook(lambda _, inputs, out: seen.append(out))
    torch.testing.assert_close(gradients(module, x, module), plain)
    assert seen
    linear = nn.Linear(4, 4)
    out = linear(torch.ones(1, 2, 4))
    assert own_output(out, linear).data_ptr() == out.data_ptr()
    assert own_output(out, Adapter(linear)).data_ptr() != out.data_ptr()


def test_another_norm_takes_part():
    module, x = some_module(), randn(2, 16, 9, 7, seed=7)
    plain = module(x)
    module.heavy_attn.norm = nn.LayerNorm(16).double()
    assert (module(x) - plain).abs().max() > 1e-3
    module.heavy_attn.norm = type("Norm", (nn.RMSNorm,), {})(16, eps=1e-6).double()
    module.heavy_attn.norm.weight = some_module().heavy_attn.norm.weight
    torch.testing.assert_close(module(x), plain)


def test_state_dict_is_what_it_was():
    light = {f"light_attn.{name}.weight" for name in ("norm", "to_qkv", "to_out")}
    heavy = {f"heavy_attn.{name}.weight" for name in ("norm", "to_q", "to_kv", "to_out")} | {"heavy_attn.null_kv"}
    routers = {f"{name}_router.routing_token" for name in ("q", "kv")}
    assert set(some_module().state_dict()) == light | heavy | routers | {"null_q_token"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules_and_autocast(dtype):
    module, x = some_module().float(), randn(2, 16, 9, 7, seed=7, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out = module(x)
    assert out.dtype == dtype
    assert module.to(dtype)(x.to(dtype)).dtype == dtype
    module.null_q_token.data = module.null_q_token.data.float()  # kept wide
    assert module(x.to(dtype)).dtype == dtype


def test_the_feed_forward_is_what_it_was():
    torch.manual_seed(0)
    module = ConditionalRoutedFeedForward(16, num_heavy_tokens=6, router_straight_through=False).double()
    x = randn(2, 16, 9, 7, seed=7)

    def composed(x):
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        routing = module.router(tokens, num_tokens=6)
        heavy = module.heavy_ff(gather_tokens(tokens, routing.indices[:, 0])) * routing.gates[:, 0].unsqueeze(-1)
        index = routing.indices[:, 0].unsqueeze(-1).expand_as(heavy)
        return module.light_ff(tokens).scatter_add(1, index, heavy).unflatten(1, (9, 7)).permute(0, 3, 1, 2)

    torch.testing.assert_close(gradients(module, x, module), gradients(module, x, composed))
