"""UNets with the light and heavy branches of CoLT5, made to be trained."""

import copy
import pickle

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention

from colt5_vision import RoutedAttentionConfig, route_attention, unroute_attention
from colt5_vision.pipelines import ConditionalRoutedAttentionBlock, build_routed_attention

FEW = {"num_heavy_tokens_kv": 1 / 4, "light_window_size": 3}
ON_MAPS = [
    "down_blocks.1.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "mid_block.attentions.0",
]
IN_TRANSFORMERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
    "mid_block.attentions.0.transformer_blocks.0.attn1",
]
OPTIONS = {
    "sum": {},
    "softmax": {"fusion": "softmax", "rotary_emb": True},
    "routed queries": {"num_heavy_tokens_q": 1 / 4, "rotary_emb": True},
    "routed queries, softmax": {"num_heavy_tokens_q": 1 / 4, "fusion": "softmax"},
    "two routes": {"num_routed_kv": 2},
    "every key": {"num_heavy_tokens_kv": 1.0},
    "every key, softmax": {"num_heavy_tokens_kv": 1.0, "fusion": "softmax"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def unet(**how):
    small = {
        "sample_size": 12,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    return UNet2DModel(**small | how)


def conditional(**how):
    small = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**small | how)


def built(model, **options):
    build_routed_attention(model, **FEW | options)
    return model


def call(model, size=(12, 20), dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.config.in_channels, *size, generator=draw, dtype=dtype)
    if isinstance(model, UNet2DModel):
        return model(x, 7).sample
    return model(x, 7, torch.randn(2, 5, 16, generator=draw, dtype=dtype)).sample


def block(dim=16, **how):
    torch.manual_seed(0)
    own = {"heads": 2, "dim_head": 8, "norm_num_groups": 4, "residual_connection": True}
    return ConditionalRoutedAttentionBlock(dim, **own | FEW | how)


def dead(module):
    return [name for name, parameter in module.named_parameters() if parameter.grad is None]


@every_option
@pytest.mark.parametrize("size", [(9, 14), (1, 1), (2, 31)])
def test_a_block_takes_any_map_and_every_parameter_gets_a_gradient(size, options):
    attention = block(**options)
    x = torch.randn(2, 16, *size, requires_grad=True)
    out = attention(x, temb=torch.randn(2, 4), scale=1.0)
    assert out.shape == x.shape and out.dtype == x.dtype
    out.square().sum().backward()
    assert dead(attention) == [] and x.grad.isfinite().all()


@every_option
def test_a_block_draws_its_weights_anew(options):
    """Made on the meta device or of other weights, it is what the constructor would have made."""
    attention = block(device="meta", **options).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.fill_(torch.nan)
    attention.init_weights()
    expected = block(**options)
    for name, parameter in attention.named_parameters():
        want = expected.get_parameter(name)
        assert parameter.isfinite().all(), name
        assert (parameter.std(correction=0) > 0) == (want.std(correction=0) > 0), name


def test_with_every_key_in_one_softmax_it_is_the_attention_of_diffusers():
    plain = Attention(
        16,
        heads=2,
        dim_head=8,
        norm_num_groups=4,
        out_bias=False,
        residual_connection=True,
        rescale_output_factor=1.7,
    ).double()
    routed = block(num_heavy_tokens_kv=1.0, fusion="softmax", rescale_output_factor=1.7).double()
    attend = routed.attention.attend
    attend.norm = torch.nn.Identity()
    attend.to_qkv.weight.data = torch.cat([plain.to_q.weight, plain.to_k.weight, plain.to_v.weight])
    attend.to_out.weight.data = plain.to_out[0].weight.data
    for parameter in plain.group_norm.parameters():
        torch.nn.init.normal_(parameter)
    routed.group_norm.load_state_dict(plain.group_norm.state_dict())
    x = torch.randn(2, 16, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(routed(x), plain(x))


@pytest.mark.parametrize("residual, factor", [(True, 1.0), (True, 2.5), (False, 2.5)])
def test_the_residual_is_added_and_the_sum_rescaled(residual, factor):
    attention = block(residual_connection=residual, rescale_output_factor=factor)
    x = torch.randn(2, 16, 6, 5)
    expected = attention.attention(attention.group_norm(x)) + (x if residual else 0)
    torch.testing.assert_close(attention(x), expected / factor)


def test_dropout_drops_in_training_only():
    attention = block(dropout=0.5)
    x = torch.randn(1, 16, 6, 6)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


@pytest.mark.parametrize(
    "make, names, sizes",
    [
        (unet, ON_MAPS, [(12, 20), (20, 12)]),
        (conditional, IN_TRANSFORMERS, [(13, 21), (21, 13), (8, 8)]),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"fusion": "softmax", "rotary_emb": True}], ids=["sum", "softmax"]
)
def test_a_unet_is_built_with_blocks_that_know_the_size_of_their_map(make, names, sizes, options):
    model = make()
    assert sorted(build_routed_attention(model, **FEW, **options)) == sorted(names)
    blocks = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, ConditionalRoutedAttentionBlock)
    }
    assert sorted(blocks) == sorted(names)
    seen = {}
    for name, module in blocks.items():
        module.attention.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].shape[2:]})
        )
    for height, width in sizes:
        out = call(model, (height, width))
        assert out.shape[2:] == (height, width) and out.isfinite().all()
        half = (height + 1) // 2, (width + 1) // 2
        for name in names:
            outer = "transformer" in name and "mid" not in name
            assert seen[name] == ((height, width) if outer else half), name
    out.square().sum().backward()
    assert dead(model) == []


def test_a_block_takes_what_it_can_from_the_layer_it_replaces():
    model = unet(attention_head_dim=4).double().eval()
    plain = model.mid_block.attentions[0]
    plain.rescale_output_factor = 1.5
    build_routed_attention(model, **FEW, layers=["mid_block.*", "down_blocks.1.*"])
    routed = model.mid_block.attentions[0]
    assert (
        routed.rescale_output_factor == 1.5 and routed.residual_connection and not routed.training
    )
    assert (routed.group_norm.num_groups, routed.group_norm.eps) == (4, plain.group_norm.eps)
    heavy = routed.attention.attend.heavy_attn
    assert heavy.heads == 4 and heavy.to_q.weight.shape == (16, 16)
    assert {p.dtype for p in routed.parameters()} == {torch.float64}
    assert all(isinstance(m, Attention) for m in model.up_blocks[0].attentions)
    assert build_routed_attention(
        model, num_heavy_tokens_kv=3, heads=2, dim_head=12, layers=[0]
    ) == [ON_MAPS[1]]
    assert model.up_blocks[0].attentions[0].attention.attend.light_attn.to_out.weight.shape == (
        16,
        24,
    )
    assert call(model, dtype=torch.float64).isfinite().all()


def test_cross_attention_and_the_layers_of_gligen_stay():
    model = built(conditional(attention_type="gated"))
    left = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    assert {name.rpartition(".transformer_blocks.0.")[2] for name in left} == {
        "attn2",
        "fuser.attn",
    }


@pytest.mark.parametrize("make", [unet, conditional])
def test_copies_and_state_dicts_give_the_same_output(make):
    model = built(make().eval())
    with torch.no_grad():
        expected = call(model)
        other = built(make().eval())
        other.load_state_dict(model.state_dict())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
            assert torch.equal(call(twin), expected)
            assert torch.equal(call(model), expected)  # it shares nothing with its twin


@pytest.mark.parametrize("make", [unet, conditional])
def test_gradient_checkpointing_changes_no_gradient(make):
    model = built(make())
    call(model).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    call(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_blocks_compile_into_one_graph():
    x, text = torch.randn(2, 32, 5, 7), torch.randn(2, 5, 16)
    maps = built(unet(block_out_channels=(8, 32))).mid_block.attentions[0].eval()
    tokens = built(conditional()).mid_block.attentions[0].eval()
    for part, given in (
        (maps, {}),
        (tokens, {"encoder_hidden_states": text, "return_dict": False}),
    ):
        compiled = torch.compile(part, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, **given), part(x, **given))


@pytest.mark.parametrize("make", [unet, conditional])
def test_it_trains_under_autocast(make):
    model = built(make())
    with torch.autocast("cpu", torch.bfloat16):
        out = call(model)
    out.float().square().sum().backward()
    assert dead(model) == [] and all(p.grad.isfinite().all() for p in model.parameters())
    difference = (out.float() - call(model)).norm() / out.float().norm()
    assert difference < 0.05


def test_routing_the_pretrained_rest_of_a_model_and_back_leaves_the_blocks_as_they_are():
    model = conditional().eval()
    build_routed_attention(model, **FEW, layers=["up_blocks.*", "mid_block.*"])
    with torch.no_grad():
        expected = call(model, (13, 21))
        route_attention(model, RoutedAttentionConfig(min_tokens=0, num_heavy_tokens_kv=1.0))
        torch.testing.assert_close(call(model, (13, 21)), expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(
            ValueError, match="model: its pretrained attention is routed, call unroute_att"
        ):
            built(model)
        unroute_attention(model)
        assert torch.equal(call(model, (13, 21)), expected)


def test_tokens_of_a_map_of_unknown_size_are_an_error():
    with pytest.raises(
        ValueError, match=r"hidden_states: expected a map \(B, C, H, W\), got 12 tokens"
    ):
        block()(torch.randn(1, 12, 16))
    model = built(conditional())
    call(model)
    inner = model.mid_block.attentions[0].transformer_blocks[0].attn1
    with pytest.raises(
        ValueError,
        match="expected the tokens of the map .*, got 60 tokens: the layer ran outside of a",
    ):
        inner(torch.randn(2, 60, 32))  # that forward is over
    assert call(model).isfinite().all()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"hidden_states": torch.randn(1, 15, 4, 4)},
            ValueError,
            "hidden_states: expected 16 channels",
        ),
        (
            {"hidden_states": torch.randn(16, 4)},
            ValueError,
            r"hidden_states: expected \(B, C, H, W\) or \(B, N, C\)",
        ),
        (
            {"hidden_states": torch.ones(1, 16, 4, 4).long()},
            TypeError,
            "hidden_states: expected a floating-point",
        ),
        (
            {"encoder_hidden_states": torch.randn(1, 3, 16)},
            ValueError,
            "encoder_hidden_states: expected None",
        ),
        ({"attention_mask": torch.ones(1, 16)}, ValueError, "attention_mask: expected None"),
    ],
)
def test_a_block_names_what_it_cannot_take(arguments, error, message):
    with pytest.raises(error, match=message):
        block()(**{"hidden_states": torch.randn(1, 16, 4, 4)} | arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"norm_num_groups": 3},
            ValueError,
            "norm_num_groups: 16 channels are not divisible by 3 groups",
        ),
        ({"heads": 0}, ValueError, "heads: expected an integer >= 1, got 0"),
        ({"rescale_output_factor": 0}, ValueError, "rescale_output_factor: expected a positive"),
        ({"channel_first": False}, ValueError, "channel_first: expected True"),
        ({"num_heavy_tokens_kv": 1.5}, ValueError, "num_heavy_tokens_kv"),
    ],
)
def test_a_block_is_not_made_of_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        block(**arguments)


@pytest.mark.parametrize(
    "make, arguments, error, message",
    [
        (
            lambda: torch.nn.Linear(2, 2),
            {},
            TypeError,
            "model: expected a UNet2DModel or UNet2DConditionModel, got L",
        ),
        (lambda: AutoencoderKL(), {}, TypeError, "got AutoencoderKL"),
        (
            unet,
            {"layers": ["mid_block.resnets.*"]},
            ValueError,
            "layers: 'mid_block.resnets.*' is no layer",
        ),
        (unet, {"layers": [4]}, ValueError, r"layers: expected indices in \[0, 4\), got 4"),
        (
            unet,
            {"layers": "mid_block"},
            TypeError,
            "layers: expected a list of names, patterns or indices",
        ),
        (
            unet,
            {"residual_connection": False},
            TypeError,
            "residual_connection: expected no such argument",
        ),
        (
            unet,
            {"window_size": 7},
            TypeError,
            "window_size.*for layer down_blocks.1.attentions.0, 16 channels",
        ),
        (unet, {"fusion": "max"}, ValueError, r"fusion: expected one of .*for layer"),
        (
            unet,
            {"dim_head": 6, "rotary_emb": True},
            ValueError,
            "heavy_dim_head: rotary_emb needs a multiple of 4",
        ),
        (
            conditional,
            {"layers": ["*.attn2"]},
            ValueError,
            "layers: .* is no layer that can be routed",
        ),
        (
            lambda: unet(
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                add_attention=False,
            ),
            {},
            ValueError,
            "model: UNet2DModel has no attention over a map",
        ),
    ],
)
def test_the_factory_names_what_is_wrong_and_changes_nothing(make, arguments, error, message):
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=message):
        built(model, **arguments)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_built_already_is_left_alone():
    model = built(unet())
    with pytest.raises(ValueError, match="model: UNet2DModel has no attention over a map"):
        built(model)
