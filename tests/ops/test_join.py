"""join on the CPU: against its reference, its gradients, its layouts, its errors."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from colt5_vision.ops import join
from colt5_vision.ops.join import eager, reference
from colt5_vision.routing import Routing

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def some_routing(batch=2, slots=4, tokens=9, dtype=torch.float64, empty=True):
    """Distinct tokens; the last slot of the last sample is empty, and points at a routed token."""
    indices = randn(batch, tokens, seed=3).argsort(-1)[:, :slots].contiguous()
    mask = torch.ones(batch, slots, dtype=torch.bool)
    if empty:
        mask[-1, -1] = False
        indices[-1, -1] = indices[-1, 0]
    gates = randn(batch, slots, seed=2, dtype=dtype)
    return Routing(indices, gates, gates, mask)


def some_inputs(dtype=torch.float64, **kwargs):
    light, heavy = randn(2, 9, 5, dtype=dtype), randn(2, 4, 5, seed=1, dtype=dtype)
    return light, heavy, some_routing(dtype=dtype, **kwargs), randn(5, seed=4, dtype=dtype)


def expected(light, heavy, routing, null):
    wide = [None if x is None else x.double() for x in (light, heavy, null)]
    indices = torch.where(routing.mask, routing.indices, -1)
    return reference.join(*wide[:2], indices, routing.gates.double(), wide[2])


@pytest.mark.parametrize("with_null", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_is_the_reference(dtype, with_null):
    light, heavy, routing, null = some_inputs(dtype)
    null = null if with_null else None
    before = light.clone()
    got = join(light, heavy, routing, null)
    assert got.dtype == dtype and torch.equal(light, before)
    assert got.untyped_storage().data_ptr() != light.untyped_storage().data_ptr()
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-6)
    want = expected(light, heavy, routing, null)
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


def test_the_reference_is_a_loop_over_tokens():
    light, heavy, routing, null = some_inputs()
    want = light + null
    for b in range(2):
        for q in range(4):
            if routing.mask[b, q]:
                i = routing.indices[b, q]
                want[b, i] = light[b, i] + routing.gates[b, q] * heavy[b, q]
    torch.testing.assert_close(expected(light, heavy, routing, null), want)


def test_wide_inputs_of_a_half_map():
    light, heavy, routing, null = some_inputs(torch.float32)
    want = expected(light.bfloat16(), heavy, routing, null.bfloat16())
    got = join(light.bfloat16(), heavy, routing, null)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=4e-2, rtol=0)
    assert join(light.double(), heavy, routing, null).dtype == torch.float64


def test_gates_stay_wide():
    """float32 gates of half rows are not rounded before the product."""
    light, heavy, routing, _ = some_inputs(torch.bfloat16)
    routing = routing._replace(gates=1 + 1e-3 * routing.gates.float())
    zero = torch.zeros_like(light)
    want = expected(zero, heavy, routing, None)
    torch.testing.assert_close(join(zero, heavy, routing).double(), want, atol=0, rtol=4e-3)


@pytest.mark.parametrize("index", ["routed", "out of range"])
def test_an_empty_slot_changes_nothing(index):
    light, heavy, routing, null = some_inputs()
    want = join(light, heavy, routing, null)
    if index == "out of range":
        routing.indices[-1, -1] = 10**6
    heavy[-1, -1] = NAN
    routing.gates[-1, -1] = NAN
    inputs = [x.requires_grad_() for x in (light, heavy, routing.gates, null)]
    got = join(light, heavy, routing, null)
    assert torch.equal(got, want)
    grads = torch.autograd.grad(got.square().sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][-1, -1].any() and not grads[2][-1, -1]


@pytest.mark.parametrize("with_null", [True, False])
def test_gradients(with_null):
    light, heavy, routing, null = some_inputs()
    inputs = [x.requires_grad_() for x in (light, heavy, routing.gates, null)[: 3 + with_null]]

    def call(light, heavy, gates, null=None):
        return join(light, heavy, routing._replace(gates=gates), null)

    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)
    grad = randn(2, 9, 5, seed=5)
    want = torch.autograd.grad(call(*inputs), inputs, grad)
    indices = torch.where(routing.mask, routing.indices, -1)
    found = eager.backward(grad, heavy, indices, routing.gates)
    torch.testing.assert_close(found[: 2 + with_null], want[1:])


@pytest.mark.parametrize("layout", ["expanded", "permuted", "sliced"])
def test_layouts(layout):
    light, heavy, routing, null = some_inputs()
    light = {
        "expanded": torch.zeros((), dtype=torch.float64).expand(2, 9, 5),
        "permuted": light.mT.contiguous().mT,
        "sliced": torch.cat([light, light], -1)[..., 2:7],
    }[layout]
    for token in (null, None):
        got = join(light, heavy, routing, token)
        torch.testing.assert_close(got, expected(light, heavy, routing, token))


def test_no_slots_and_no_samples():
    light, null = randn(2, 9, 5), randn(5, seed=4)
    got = join(light, light[:, :0], some_routing(slots=0, empty=False), null)
    assert torch.equal(got, light + null)
    none = some_routing(batch=0, empty=False)
    assert join(light[:0], light[:0, :4], none, null).shape == (0, 9, 5)


def test_one_pass_over_the_map():
    light, heavy, routing, null = some_inputs()
    for token in (null, None):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            join(light, heavy, routing, token)
        names = [e.name for e in profile.events() if e.input_shapes[:1] == [[2, 9, 5]]]
        assert sorted(names) == ["aten::add", "aten::scatter_add_"]


@pytest.mark.parametrize("mapped", range(1, 32))
def test_vmap_over_any_of_its_inputs(mapped):
    light, heavy, routing, null = some_inputs()
    full = [light, heavy, routing.indices, routing.gates, null]
    other = [light + 1, heavy * 2, (routing.indices + 1) % 9, routing.gates - 1, null * 3]
    dims = tuple(0 if mapped >> i & 1 else None for i in range(5))
    stacked = [a if d is None else torch.stack([a, b]) for a, b, d in zip(full, other, dims)]

    def call(light, heavy, indices, gates, null):
        return join(light, heavy, routing._replace(indices=indices, gates=gates), null)

    got = torch.vmap(call, in_dims=dims)(*stacked)
    for i in range(2):
        each = [x if d is None else x[i] for x, d in zip(stacked, dims)]
        torch.testing.assert_close(got[i], call(*each))


def test_compile_and_make_fx_see_plain_operations():
    light, heavy, routing, null = some_inputs()
    graph = make_fx(lambda *inputs: join(*inputs))(light, heavy, routing, null)
    assert not [n for n in graph.graph.nodes if "colt5" in str(n.target)]
    torch.testing.assert_close(
        graph(light, heavy, routing, null), join(light, heavy, routing, null)
    )
    torch._dynamo.reset()
    compiled = torch.compile(join, backend="aot_eager", fullgraph=True, dynamic=True)
    light.requires_grad_()
    for got in (compiled(light, heavy, routing, null), join(light, heavy, routing, null)):
        torch.testing.assert_close(got, expected(light, heavy, routing, null))
        (grad,) = torch.autograd.grad(got.sum(), light)
        assert torch.equal(grad, torch.ones_like(light))


def test_meta_and_backends():
    light, heavy, routing, null = some_inputs()
    with pytest.raises(RuntimeError, match="^join: backend 'triton' cannot run: "):
        join(light, heavy, routing, null, backend="triton")
    routing = Routing(*(x.to("meta") for x in routing))
    got = join(light.to("meta"), heavy.to("meta"), routing, null.to("meta"))
    assert got.is_meta and got.shape == (2, 9, 5)


def changed(**fields):
    return some_routing()._replace(**fields)


@pytest.mark.parametrize(
    "error, name, call",
    [
        (TypeError, "light", {"light": None}),
        (ValueError, "light", {"light": randn(9, 5)}),
        (TypeError, "heavy", {"heavy": torch.ones(2, 4, 5, dtype=torch.int64)}),
        (ValueError, "heavy", {"heavy": randn(2, 4, 6)}),
        (ValueError, "heavy", {"heavy": randn(1, 4, 5)}),
        (ValueError, "heavy", {"heavy": randn(2, 4, 5).to("meta")}),
        (TypeError, "routing", {"routing": None}),
        (ValueError, "routing.indices", {"routing": some_routing(slots=3)}),
        (TypeError, "routing.indices", {"routing": changed(indices=[1])}),
        (TypeError, "routing.indices", {"routing": changed(indices=torch.zeros(2, 4))}),
        (ValueError, "routing.indices", {"routing": changed(indices=torch.full((2, 4), 9))}),
        (ValueError, "routing.indices", {"routing": changed(indices=torch.full((2, 4), -1))}),
        (ValueError, "routing.gates", {"routing": changed(gates=randn(2, 4, 1))}),
        (TypeError, "routing.gates", {"routing": changed(gates=None)}),
        (TypeError, "routing.mask", {"routing": changed(mask=None)}),
        (TypeError, "routing.mask", {"routing": changed(mask=torch.ones(2, 4))}),
        (ValueError, "null", {"null": randn(1, 5)}),
        (TypeError, "null", {"null": 0.0}),
        (ValueError, "null", {"null": randn(5).to("meta")}),
        (ValueError, "backend", {"backend": "cuda"}),
    ],
)
def test_errors_name_the_argument(error, name, call):
    given = {**dict(zip(("light", "heavy", "routing", "null"), some_inputs())), **call}
    with pytest.raises(error, match=rf"^{name}: expected "):
        join(**given)
