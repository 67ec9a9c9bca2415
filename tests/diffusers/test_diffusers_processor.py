"""RoutedAttnProcessor, set by hand on single attention layers."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    FusedAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux import FluxAttention

from colt5_vision import RoutedAttentionConfig
from colt5_vision.pipelines import RoutedAttnProcessor
from tests.support.diffusers_cases import close, config, noise, spread

SIZE, TEXT, WIDTH = (7, 9), 4, 32
SEQUENCE = {"query_dim": WIDTH, "heads": 2, "dim_head": 16}
MAP = SEQUENCE | {"norm_num_groups": 8, "bias": True, "residual_connection": True}
ADDED = {"added_kv_proj_dim": WIDTH, "out_dim": WIDTH, "bias": True, "context_pre_only": False}


def tokens(text=0):
    return {"hidden_states": noise(2, SIZE[0] * SIZE[1] + text, WIDTH)}


def with_text():
    return tokens() | {"encoder_hidden_states": noise(2, TEXT, WIDTH, seed=1)}


def maps():
    return {"hidden_states": noise(2, WIDTH, *SIZE)}


def turned(call):
    place = torch.arange(TEXT + SIZE[0] * SIZE[1])
    rotary = get_1d_rotary_pos_embed(
        16, place, repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64
    )
    return call() | {"image_rotary_emb": rotary}


def added():
    how = MAP | {"added_kv_proj_dim": WIDTH}
    return Attention(**how, processor=AttnAddedKVProcessor2_0())


LAYERS = {
    "tokens": (partial(Attention, **SEQUENCE), tokens, "map"),
    "fused": (partial(Attention, **SEQUENCE, processor=FusedAttnProcessor2_0()), tokens, "map"),
    "map": (partial(Attention, **MAP), maps, "map"),
    "added keys": (
        added,
        lambda: maps() | {"encoder_hidden_states": noise(2, TEXT, WIDTH, seed=1)},
        "before",
    ),
    "sd3": (
        partial(Attention, **SEQUENCE, **ADDED, processor=JointAttnProcessor2_0()),
        with_text,
        "behind",
    ),
    "flux double": (
        partial(FluxAttention, **SEQUENCE, **ADDED),
        partial(turned, with_text),
        "before",
    ),
    "flux single": (
        partial(FluxAttention, **SEQUENCE, out_dim=WIDTH, bias=True, pre_only=True),
        partial(turned, partial(tokens, TEXT)),
        "before",
    ),
}
every_layer = pytest.mark.parametrize(("make", "inputs", "place"), LAYERS.values(), ids=LAYERS)


def build(make):
    torch.manual_seed(0)
    attn = spread(make()).double()
    if isinstance(attn.processor, FusedAttnProcessor2_0):
        attn.fuse_projections()
    return attn


def routed(attn, place, share=0.25, **how):
    size = None if isinstance(attn, Attention) and attn.group_norm is not None else SIZE
    attn = copy.deepcopy(attn)
    processor = RoutedAttnProcessor(
        config(share, **how), exact=attn.processor, grid_size=size, place=place
    )
    attn.set_processor(processor)
    return attn


def call(attn, given):
    with torch.no_grad():
        out = attn(**given)
    return out if isinstance(out, tuple) else (out,)


def test_constructs_without_arguments_and_has_diffusers_signature():
    processor = RoutedAttnProcessor()
    assert processor.config == RoutedAttentionConfig()
    names = list(inspect.signature(processor.__call__).parameters)
    assert names[:4] == ["attn", "hidden_states", "encoder_hidden_states", "attention_mask"]
    assert {"temb", "image_rotary_emb", "ip_hidden_states", "ip_adapter_masks"} < set(names)


@every_layer
def test_every_key_routed_is_the_original_and_fewer_differ(make, inputs, place):
    attn, given = build(make), inputs()
    expected = call(attn, given)
    every, few = routed(attn, place, 1.0), routed(attn, place)
    close(call(every, given), expected, 1e-10)
    found = call(few, given)
    assert (found[0] - expected[0]).abs().max() > 1e-3 and found[0].isfinite().all()
    assert few.processor.calls.routed == 1 and not few.processor.calls.exact
    assert attn.state_dict().keys() == few.state_dict().keys()


@every_layer
def test_copies_and_pickles_give_the_same(make, inputs, place):
    attn, given = routed(build(make), place), inputs()
    expected = call(attn, given)
    for twin in (copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
        assert all(map(torch.equal, call(twin, given), expected))


@pytest.mark.parametrize("name", ["tokens", "map"])
def test_cross_attention_is_exact_and_counted(name):
    make, inputs, place = LAYERS[name]
    attn = build(make)
    given = inputs() | {"encoder_hidden_states": noise(2, SIZE[0] * SIZE[1], WIDTH, seed=1)}
    few = routed(attn, place)
    assert torch.equal(call(few, given)[0], call(attn, given)[0])
    assert few.processor.calls.exact == {"cross-attention": 1}


def test_what_cannot_be_routed_is_exact_and_counted():
    attn, given = build(LAYERS["tokens"][0]), tokens()
    expected = call(attn, given)[0]
    kept = SIZE[0] * SIZE[1] + 1
    for how, reason in (
        ({"min_tokens": kept}, "fewer tokens than min_tokens"),
        ({"grid_size": (7, 8)}, "63 keys are not a map of 7 x 8 tokens and its other tokens"),
        ({"grid_size": None}, "the layer was given tokens, and grid_size was not told"),
    ):
        processor = RoutedAttnProcessor(
            config(min_tokens=how.pop("min_tokens", 1)), **{"grid_size": SIZE} | how
        )
        few = copy.deepcopy(attn)
        few.set_processor(processor)
        assert torch.equal(call(few, given)[0], expected)
        assert few.processor.calls.exact == {reason: 1}


def test_a_mask_of_keys_is_kept():
    attn, given = build(LAYERS["tokens"][0]), tokens()
    given["attention_mask"] = torch.where(noise(2, 1, SIZE[0] * SIZE[1]) > 0, 0.0, -1e4).double()
    close(call(routed(attn, "map", 1.0), given), call(attn, given), 1e-10)


BAD = {
    "config": ({"config": {"window_size": 3}}, TypeError, "config: expected a Routed.*got dict"),
    "learned": ({"config": config(router="learned")}, ValueError, "needs route_attention"),
    "place": ({"place": "left"}, ValueError, "place: expected 'map', .* got 'left'"),
}


@pytest.mark.parametrize(("how", "kind", "match"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_named(how, kind, match):
    with pytest.raises(kind, match=match):
        RoutedAttnProcessor(**how)
