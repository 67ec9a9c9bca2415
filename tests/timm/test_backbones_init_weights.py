"""``init_weights()`` of the backbones draws what the constructor does, on any memory."""

import pytest
import timm
import torch
from torch import nn

import colt5_vision.models  # noqa: F401
from colt5_vision.branches import LightBranch

VARIANTS = {
    "vit": ("test_colt5_vit", {}),
    "vit-sum": (
        "test_colt5_vit",
        {"fusion": "sum", "num_heavy_tokens_q": 1 / 4, "init_values": 0.1},
    ),
    "vit-patch": ("test_colt5_vit", {"stem": "patch", "init_values": 0.1, "num_classes": 0}),
    "vit-schedule": ("test_colt5_vit", {"routing_schedule": 10}),
    "pyramid": ("test_colt5_pyramid", {"global_pool": "catavgmax"}),
    "pyramid-sum": ("test_colt5_pyramid", {"fusion": "sum", "init_values": 0.1}),
}
every = pytest.mark.parametrize("variant", VARIANTS)


def build(variant, **more):
    name, options = VARIANTS[variant]
    return timm.create_model(name, **options, **more)


def spoil(model):
    """Fill all memory of a model with what no initialisation gives."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


@every
def test_after_to_empty_nothing_is_left_uninitialised(variant):
    model = build(variant, device="meta").to_empty(device="cpu")
    spoil(model)
    torch.manual_seed(0)
    model.init_weights()
    expected = build(variant)
    spoil(expected)
    torch.manual_seed(0)
    expected.init_weights()

    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all() and not (tensor == 77).any(), name
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), expected(x))


@every
def test_it_draws_the_distributions_of_the_constructor(variant):
    torch.manual_seed(0)
    made, again = build(variant), build(variant)
    spoil(again)
    again.init_weights()
    for (name, a), b in zip(made.state_dict().items(), again.state_dict().values()):
        if a.numel() < 64 or not a.is_floating_point():
            continue
        if (a == a.flatten()[0]).all():  # a constant
            assert torch.equal(a, b), name
        else:
            assert not torch.equal(a, b), name
            # the standard deviation of n draws from a normal is off by 1 / sqrt(2 n)
            scatter = 6 / (2 * a.numel()) ** 0.5
            assert (a.std() / b.std()).log().abs() < scatter, name
            assert (a.mean() - b.mean()).abs() < 6 * a.std() * (2 / a.numel()) ** 0.5, name


@every
def test_each_kind_of_weight_has_its_distribution(variant):
    torch.manual_seed(0)
    model = build(variant)
    spoil(model)
    model.init_weights()
    small = {m.to_out.weight for m in model.modules() if isinstance(m, LightBranch)}
    assert bool(small) == ("sum" in variant)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            std = 0.004 if module.weight in small else 0.02
            assert module.weight.std().item() == pytest.approx(std, rel=0.2)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.running_var == 1).all() and not module.running_mean.any()
            assert module.num_batches_tracked == 0
    for name, parameter in model.named_parameters():
        if name.endswith("routing_token"):
            assert parameter.std().item() == pytest.approx(1, abs=0.5)
        if name.endswith(("null_key.kv", "null_q_token")):
            assert not parameter.any()
        if name.endswith("gamma"):
            assert (parameter == 0.1).all()
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all()
    if "schedule" in variant:
        assert model.stem.schedule.forwards == 0


def test_it_starts_a_schedule_anew():
    model = build("vit-schedule")
    for _ in range(3):
        model(torch.randn(1, 3, 64, 64))
    assert model.stem.schedule.forwards == 3
    model.init_weights()
    model(torch.randn(1, 3, 64, 64))
    assert model.stem.schedule.forwards == 1 and model.blocks[0].attn.key_factor == 16


def test_the_light_branch_of_sum_starts_small_among_weights_of_timms_scale():
    torch.manual_seed(0)
    model = timm.create_model("colt5_vit_tiny_patch16_224", fusion="sum", num_classes=3)
    lights = [m for m in model.modules() if isinstance(m, LightBranch)]
    assert lights
    for light in lights:
        for linear, std in ((light.to_qkv, 0.02), (light.to_out, 0.004)):
            found = linear.weight.std()
            torch.testing.assert_close(found, torch.tensor(std), atol=std / 10, rtol=0)
