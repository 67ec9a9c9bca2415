"""Every module under torch's transforms and tracers: right, never silently wrong."""

import functools

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import colt5_vision.models  # noqa: F401
from colt5_vision import (
    ConditionalRoutedAutoregressiveAttention,
    CoordinateDescentRouter,
    route_attention,
)
from colt5_vision.ops.sdpa import scaled_dot_product_attention
from tests.support.module_cases import CASES, DIM, build, image
from tests.support.module_cases import apply as apply_case


def of_case(name):
    """A module of the list, its call on a map, and a map of two samples."""
    case = CASES[name]
    module = build(case, torch.float64)
    return module, functools.partial(apply_case, case), image(2, dtype=torch.float64)


def causal():
    torch.manual_seed(0)
    width = {"light_dim_head": 8, "light_heads": 2, "heavy_dim_head": 8, "heavy_heads": 2}
    counts = {"num_heavy_tokens_q": 2, "num_heavy_tokens_kv": 3}
    layer = ConditionalRoutedAutoregressiveAttention(DIM, light_window_size=4, **width, **counts)
    return layer.double(), lambda module, x: module(x), image(2, dtype=torch.float64).flatten(1, 2)


def router():
    torch.manual_seed(0)
    module = CoordinateDescentRouter(DIM, straight_through=False, num_routing_tokens=2).double()
    how = {"num_tokens": 5}
    return module, lambda module, x: module(x, **how).gates, causal()[2]


def network(name, routed=None, **options):
    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 3, **options}
    model = timm.create_model(name, **options).double().eval()
    if routed is not None:
        how = {"window_size": 2, "num_heavy_tokens_kv": 1 / 4, "min_tokens": 1}
        route_attention(model, router=routed, **how)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, lambda module, x: module(x), x


MADE = {name: functools.partial(of_case, name) for name in CASES} | {
    "causal": causal,
    "router": router,
    "backbone": lambda: network("test_colt5_vit", depth=1),
    "swapped": lambda: network("vit_tiny_patch16_224", "sampled", patch_size=8, depth=1),
    "grouped": lambda: network("vit_tiny_patch16_224", "grouped", patch_size=8, depth=1),
}
every = pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
SWAPPED = "swapped"


def random_like(x, seed=5):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


@every
def test_forward_mode_is_the_derivative_of_what_came_out(made):
    """Also where gates are straight through: their gradient is for backward alone. Nobody need ask
    for plain attention."""
    module, apply, x = made()
    call, along, step = functools.partial(apply, module), random_like(x), 1e-6
    out, moved = jvp(call, (x,), (along,))
    with torch.no_grad():
        torch.testing.assert_close(out, call(x))
        want = (call(x + step * along) - call(x - step * along)) / (2 * step)
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(moved, want, rtol=1e-4, atol=1e-6)

    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, along))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, moved)


def test_forward_mode_leaves_the_switches_of_the_process_alone(monkeypatch):
    """``sdpa_kernel`` sets them for other threads, too."""
    monkeypatch.setattr(torch._C, "_set_sdp_use_flash", None)
    with pytest.raises(TypeError), sdpa_kernel(SDPBackend.MATH):
        pass
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    mask = torch.rand(9, 9) > 0.3
    mask[0] = False

    def attend(q):
        return scaled_dot_product_attention(q, k, v, mask, scale=0.7)

    out, moved = jvp(attend, (q,), (q,))
    torch.testing.assert_close(out, attend(q))
    assert moved[:, :, 1:].abs().max() > 1e-4 and not moved[:, :, 0].any()


class Applied(torch.nn.Module):
    """A module whose forward takes what ``apply`` does, as transforms and tracers want it."""

    def __init__(self, module, apply):
        super().__init__()
        self.module, self.apply_to = module, apply

    def forward(self, x):
        return self.apply_to(self.module, x)


@every
def test_gradients_of_each_sample_are_those_it_has_alone(made):
    module, apply, x = made()
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

    applied = Applied(module, apply)

    def loss(parameters, sample):
        named = {f"module.{name}": value for name, value in parameters.items()}
        return functional_call(applied, named, (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        module.zero_grad()
        apply(module, sample[None]).square().sum().backward()
        for name, parameter in module.named_parameters():
            if name in found:
                want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(found[name][i], want)


@every
def test_a_second_derivative_is_right_or_refused(made):
    module, apply, x = made()
    for part in module.modules():  # what is straight through is no derivative of what came out
        if getattr(part, "straight_through", False):
            part.straight_through = part.log_gradient = False
    weight, step = random_like(x), 1e-5

    def slope(x):
        x = x.detach().requires_grad_()
        out = apply(module, x)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return x, first

    with sdpa_kernel(SDPBackend.MATH):
        at, first = slope(x)
        (second,) = torch.autograd.grad((first * weight).sum(), at)
        moved = (slope(x + step * weight)[1] - slope(x - step * weight)[1]) / (2 * step)
    torch.testing.assert_close(second, moved.detach(), rtol=1e-4, atol=1e-5)


@every
def test_traced_once_it_gives_the_same(made):
    module, apply, x = made()
    call, other = Applied(module, apply).eval(), random_like(x, seed=6)
    with torch.no_grad():
        traced = torch.jit.trace(call, (x,), check_trace=False)
        torch.testing.assert_close(traced(other), call(other))
        torch.testing.assert_close(make_fx(call)(x)(other), call(other))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            out = call(fake.from_tensor(x))
        want = call(x)
        assert (out.shape, out.dtype) == (want.shape, want.dtype)


# their attention is torch's own, whose CPU kernel torch counts as 0, or they have none
NOT_OURS = ("sum-heavy", "ff", "sequence", "block-sequence", "cross", "causal", "router")


@pytest.mark.parametrize("name", MADE)
def test_flops_are_counted(name):
    module, apply, x = MADE[name]()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        apply(module, x)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = "grouped" if name == "grouped" else "routed_window"
    assert counter.get_total_flops() > 0
    assert name.startswith(NOT_OURS) or counts[f"colt5_vision.{attention}_attention"] > 0
