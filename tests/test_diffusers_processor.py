"""RoutedAttnProcessor on single attention layers: the original's results where they must be, and what it carries."""

import copy
import inspect
import io
from functools import partial

import pytest
import torch
from colt5_vision.pipelines import RoutedAttentionConfig, RoutedAttnProcessor
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from diffusers_cases import close, config, noise, spread

from colt5_vision.reroute import MapSize

SIZE, TEXT, WIDTH = (7, 9), 4, 32
SEQUENCE = {"query_dim": WIDTH, "heads": 2, "dim_head": 16}
MAP = SEQUENCE | {"norm_num_groups": 8, "bias": True, "residual_connection": True, "rescale_output_factor": 1.4}
JOINT = SEQUENCE | {"added_kv_proj_dim": WIDTH, "out_dim": WIDTH, "bias": True, "context_pre_only": False}
DOUBLE = SEQUENCE | {"added_kv_proj_dim": WIDTH, "out_dim": WIDTH, "context_pre_only": False, "bias": True}
SINGLE = SEQUENCE | {"out_dim": WIDTH, "bias": True, "pre_only": True}


def rotary():
    place = torch.arange(TEXT + SIZE[0] * SIZE[1])
    return get_1d_rotary_pos_embed(16, place, repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64)


def tokens(batch=2, text=False):
    return {"hidden_states": noise(batch, SIZE[0] * SIZE[1] + (TEXT if text else 0), WIDTH)}


def with_text(batch=2):
    return tokens(batch) | {"encoder_hidden_states": noise(batch, TEXT, WIDTH, seed=1)}


def maps(batch=2):
    return {"hidden_states": noise(batch, WIDTH, *SIZE)}


def spatial(batch=2):
    return maps(batch) | {"temb": noise(batch, 8, *SIZE, seed=2)}


def turned(call, batch=2):
    return call(batch) | {"image_rotary_emb": rotary()}


def hinted(batch=2):
    return with_text(batch) | {"ip_hidden_states": noise(batch, 3, WIDTH, seed=3), "temb": noise(batch, WIDTH, seed=4)}


def hinted_list(batch=2):
    return turned(with_text, batch) | {"ip_hidden_states": [noise(batch, 3, WIDTH, seed=3)]}


def sd3_ip():
    return Attention(**JOINT, processor=SD3IPAdapterJointAttnProcessor2_0(WIDTH, WIDTH, 16, WIDTH))


attention = partial(partial, Attention)
LAYERS = {
    "tokens": (attention(**SEQUENCE), tokens),
    "tokens qk_norm": (attention(**SEQUENCE, qk_norm="layer_norm", bias=True), tokens),
    "tokens residual": (attention(**SEQUENCE, residual_connection=True, rescale_output_factor=0.7), tokens),
    "tokens AttnProcessor": (attention(**SEQUENCE, processor=AttnProcessor()), tokens),
    "tokens SlicedAttnProcessor": (attention(**SEQUENCE, processor=SlicedAttnProcessor(1)), tokens),
    "tokens unscaled": (attention(**SEQUENCE, scale_qk=False), tokens),
    "tokens fused": (attention(**SEQUENCE, processor=FusedAttnProcessor2_0()), tokens),
    "map": (attention(**MAP), maps),
    "map AttnProcessor": (attention(**MAP, processor=AttnProcessor()), maps),
    "map SlicedAttnProcessor": (attention(**MAP, processor=SlicedAttnProcessor(2)), maps),
    "map spatial norm": (attention(**SEQUENCE, spatial_norm_dim=8, residual_connection=True), spatial),
    "sd3": (attention(**JOINT, processor=JointAttnProcessor2_0(), qk_norm="rms_norm"), with_text),
    "sd3 last": (attention(**JOINT | {"context_pre_only": True}, processor=JointAttnProcessor2_0()), with_text),
    "sd3 fused": (attention(**JOINT, processor=FusedJointAttnProcessor2_0()), with_text),
    "sd3 ip-adapter": (sd3_ip, hinted),
    "flux ip-adapter": (
        lambda: FluxAttention(**DOUBLE, processor=FluxIPAdapterAttnProcessor(32, 32, (3,))),
        hinted_list,
    ),
    "flux double": (partial(FluxAttention, **DOUBLE), partial(turned, with_text)),
    "flux single": (partial(FluxAttention, **SINGLE), partial(turned, partial(tokens, text=True))),
}
every_layer = pytest.mark.parametrize(("make", "inputs"), LAYERS.values(), ids=LAYERS)


def some(*names):
    return pytest.mark.parametrize(("make", "inputs"), [LAYERS[name] for name in names], ids=names)


def build(make, dtype=torch.float64):
    torch.manual_seed(0)
    attn = spread(make()).to(dtype)
    if isinstance(attn.processor, (FusedAttnProcessor2_0, FusedJointAttnProcessor2_0)):
        attn.fuse_projections()
    return attn


def routed(attn, share=0.25, size=SIZE, **how):
    """The layer with its processor replaced; maps have no use for the size that sequences are told."""
    dim = {"dim": attn.to_k.out_features} if how.get("router") == "learned" else {}
    where = {"dtype": attn.to_k.weight.dtype} if dim else {}
    attn.set_processor(RoutedAttnProcessor(config(share, **how), exact=attn.processor, **dim, **where))
    tell(attn, size)
    return attn


def tell(attn, size=SIZE):
    attn.processor.map_size = None if size is None else MapSize()
    if size is not None:
        attn.processor.map_size.begin(size, TEXT)


def call(attn, given):
    with torch.no_grad():
        if isinstance(getattr(attn.processor, "map_size", None), MapSize):
            attn.processor.map_size.begin(attn.processor.map_size.size, TEXT)
        out = attn(**given)
    return out if isinstance(out, tuple) else (out,)


def test_constructs_without_arguments_and_has_diffusers_signature():
    processor = RoutedAttnProcessor()
    assert processor.config == RoutedAttentionConfig()
    names = list(inspect.signature(processor.__call__).parameters)
    assert names[:4] == ["attn", "hidden_states", "encoder_hidden_states", "attention_mask"]
    assert {"temb", "image_rotary_emb", "ip_hidden_states", "ip_adapter_masks"} < set(names)
    assert not list(processor.parameters()) and not list(processor.buffers()) and not processor.state_dict()


@every_layer
def test_every_key_routed_is_the_original_and_fewer_differ(make, inputs):
    attn, given = build(make), inputs()
    expected = call(attn, given)
    close(call(routed(copy.deepcopy(attn), 1.0), given), expected, 1e-10)
    found = call(routed(attn), given)
    assert all((a - b).abs().max() > 1e-3 and a.isfinite().all() for a, b in zip(found[:1], expected[:1], strict=True))


def test_the_scale_is_the_one_the_replaced_processor_uses():
    """AttnProcessor2_0 knows no scale but the default one."""
    attn, given = build(attention(**SEQUENCE, scale_qk=False, processor=AttnProcessor2_0())), tokens()
    expected = call(attn, given)
    close(call(routed(attn, 1.0), given), expected, 1e-10)


@every_layer
def test_gradients_are_the_originals_when_every_key_is_routed(make, inputs):
    attn, given = build(make), inputs()
    twin = routed(copy.deepcopy(attn), 1.0)
    for layer in (attn, twin):
        out = layer(**given)
        sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    found, expected = (
        {name.replace(".exact", ""): p.grad for name, p in layer.named_parameters() if p.grad is not None}
        for layer in (twin, attn)
    )
    assert expected
    close(found, expected, 1e-9)


@every_layer
def test_a_batch_gives_what_its_samples_give(make, inputs):
    attn, given = routed(build(make), num_heavy_tokens_q=0.5), inputs(3)
    batched = {name: value for name, value in given.items() if name != "image_rotary_emb"}

    def cut(value, i):
        return [cut(one, i) for one in value] if isinstance(value, list) else value[i : i + 1]

    singles = [call(attn, given | {name: cut(value, i) for name, value in batched.items()}) for i in range(3)]
    close(call(attn, given), tuple(torch.cat(parts) for parts in zip(*singles, strict=True)), 1e-10)


@every_layer
def test_fewer_than_min_tokens_and_unknown_sizes_are_bit_for_bit_the_original(make, inputs):
    attn, given = build(make), inputs()
    expected = call(attn, given)
    kept = {"min_tokens": SIZE[0] * SIZE[1] + 1}
    assert all(map(torch.equal, call(routed(copy.deepcopy(attn), **kept), given), expected))
    if given["hidden_states"].ndim == 3:
        for size in (None, (7, 8), (1, TEXT + SIZE[0] * SIZE[1] + 1)):
            assert all(map(torch.equal, call(routed(copy.deepcopy(attn), size=size), given), expected))
    kept = {"min_tokens": SIZE[0] * SIZE[1]}
    assert not torch.equal(call(routed(attn, **kept), given)[0], expected[0])


def lengths(kind):
    number = SIZE[0] * SIZE[1]
    cross = {"encoder_hidden_states": noise(2, number, WIDTH, seed=1)}
    return {
        "cross": cross,
        "mask": {"attention_mask": torch.where(noise(2, 1, number, seed=2) > 0, 0.0, -1e4).double()},
        "cross and mask": cross | {"attention_mask": noise(2, 1, number, seed=2)},
    }[kind]


@pytest.mark.parametrize("kind", ["cross", "mask", "cross and mask"])
@some("tokens", "map", "tokens AttnProcessor", "tokens SlicedAttnProcessor", "tokens fused")
def test_cross_attention_and_masks_are_bit_for_bit_the_original(make, inputs, kind):
    attn = build(make)
    if isinstance(attn.processor, FusedAttnProcessor2_0) and "cross" in kind:
        attn = build(attention(**SEQUENCE, cross_attention_dim=WIDTH, processor=FusedAttnProcessor2_0()))
    given = inputs() | lengths(kind)
    expected = call(attn, given)
    assert torch.equal(call(routed(attn), given)[0], expected[0])


@pytest.mark.parametrize("layer_type", ["sd3", "flux double", "flux single"])
def test_a_mask_in_joint_attention_is_bit_for_bit_the_original(layer_type):
    make, inputs = LAYERS[layer_type]
    attn, number = build(make), TEXT + SIZE[0] * SIZE[1]
    given = inputs() | {"attention_mask": torch.where(noise(2, 1, number, number) > 0, 0.0, -1e4).double()}
    expected = call(attn, given)
    assert all(map(torch.equal, call(routed(attn), given), expected))


def test_added_keys_and_values_are_bit_for_bit_the_original():
    attn = build(attention(**MAP, added_kv_proj_dim=WIDTH, only_cross_attention=False))
    given = maps() | {"encoder_hidden_states": noise(2, TEXT, WIDTH, seed=1)}
    for call_with in (given, maps()):
        attn.set_processor(AttnProcessor2_0())
        expected = call(attn, call_with)
        assert torch.equal(call(routed(attn), call_with)[0], expected[0])
    with pytest.raises(ValueError, match="exact: .*got AttnAddedKVProcessor2_0"):
        RoutedAttnProcessor(exact=AttnAddedKVProcessor2_0())


def test_a_size_serves_one_call_of_a_layer():
    attn, given = build(LAYERS["tokens"][0]), tokens()
    expected = call(attn, given)[0]
    with torch.no_grad():
        assert not torch.equal(routed(attn)(**given), expected)
        assert torch.equal(attn(**given), expected)


@some("map spatial norm")
def test_the_time_embedding_may_come_by_place(make, inputs):
    attn, given = build(make), inputs()
    expected = call(attn, given)[0]
    with torch.no_grad():
        found = RoutedAttnProcessor(config(1.0))(attn, given["hidden_states"], None, None, given["temb"])
    close(found, expected, 1e-10)


@some("sd3", "flux double", "flux single")
def test_text_sees_the_whole_map_and_all_of_the_map_sees_the_text(make, inputs):
    attn, given = routed(build(make), router="window"), inputs(1)
    before = call(attn, given)

    def moved(name, place):
        changed = given[name].clone()
        changed[:, place] += 3
        after = call(attn, given | {name: changed})
        rows = [(a - b).abs().amax((0, 2)) > 1e-12 for a, b in zip(after, before, strict=True)]
        return rows if len(rows) == 2 else (rows[0][TEXT:], rows[0][:TEXT])

    for corner in (0, SIZE[0] * SIZE[1] - 1):
        image, text = moved("hidden_states", corner if "encoder_hidden_states" in given else TEXT + corner)
        assert text.all() and 1 < image.sum() <= 9
    for place in range(TEXT):
        image, text = moved("encoder_hidden_states" if "encoder_hidden_states" in given else "hidden_states", place)
        assert image.all() and text.all()


@some("tokens", "map", "sd3", "flux double", "flux single")
def test_a_learned_routers_weights_are_all_in_leaves_and_move_the_output(make, inputs):
    attn, given = build(make), inputs()
    plain = call(routed(copy.deepcopy(attn)), given)
    processor = routed(attn, router="learned").processor
    close(call(attn, given), plain, 1e-12)
    assert list(processor.parameters())
    assert all(not list(m.children()) for m in processor.modules() if list(m.parameters(recurse=False)))
    names = {name.rpartition(".")[2] for name, _ in processor.named_modules()}
    assert not names & {"to_q", "to_k", "to_v", "to_out", "to_qkv", "add_q_proj", "add_k_proj", "add_v_proj"}
    torch.nn.init.normal_(processor.routing.correction[2].weight, std=3)
    assert (call(attn, given)[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("router", ["mean_query", "learned"])
@every_layer
def test_copies_and_pickles_give_the_same(make, inputs, router):
    attn, given = routed(build(make), router=router), inputs()
    expected = call(attn, given)
    file = io.BytesIO()
    torch.save(attn, file)
    file.seek(0)
    for twin in (copy.deepcopy(attn), torch.load(file, weights_only=False)):
        assert twin.processor is not attn.processor and twin.processor.config == attn.processor.config
        assert all(map(torch.equal, call(twin, given), expected))
        twin.processor.map_size = None
    assert all(map(torch.equal, call(attn, given), expected))


def cast(given, dtype):
    def one(value):
        return [one(each) for each in value] if isinstance(value, list) else value.to(dtype)

    return {name: value if name == "image_rotary_emb" else one(value) for name, value in given.items()}


def error(found, expected):
    return max((a.double() - b).abs().max() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("router", ["mean_query", "learned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_layer
def test_half_precision_is_as_near_as_the_originals(make, inputs, dtype, router):
    exact, given = call(build(make), inputs()), cast(inputs(), dtype)
    attn = build(make, dtype)
    stock = call(attn, given)
    found = call(routed(attn, 1.0, router=router), given)
    assert [x.dtype for x in found] == [x.dtype for x in stock] == [dtype] * len(stock)
    assert error(found, exact) < 1.5 * error(stock, exact)


@pytest.mark.parametrize("router", ["mean_query", "learned"])
@every_layer
def test_autocast_is_as_near_as_the_originals(make, inputs, router):
    exact, given = call(build(make), inputs()), cast(inputs(), torch.float32)
    attn = build(make, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stock = call(attn, given)
        found = call(routed(attn, 1.0, router=router), given)
    assert [x.dtype for x in found] == [x.dtype for x in stock]
    assert error(found, exact) < 1.5 * error(stock, exact)


BAD = {
    "config": ({"config": {"window_size": 3}}, TypeError, "config: expected a RoutedAttentionConfig, got dict"),
    "exact": ({"exact": object()}, ValueError, "exact: expected one of .*got object"),
    "class": ({"exact": FluxAttnProcessor}, ValueError, "exact: expected one of .*got type"),
    "dim": ({"config": config(router="learned")}, TypeError, "dim: "),
    "no dim": ({"config": config(router="learned"), "dim": 0}, ValueError, "dim: "),
}


@pytest.mark.parametrize(("how", "kind", "match"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_named(how, kind, match):
    with pytest.raises(kind, match=match):
        RoutedAttnProcessor(**how)
