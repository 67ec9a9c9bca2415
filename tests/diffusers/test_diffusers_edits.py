"""Models that edit: other images stand beside the map, and have windows of their own."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from colt5_vision import route_attention, routed_layers, unroute_attention
from colt5_vision.pipelines.sites import raster
from tests.support.diffusers_cases import close, config
from tests.support.diffusers_models import MODELS, build, run
from tests.support.diffusers_models.tiny import TEXT, image, noise, places, tokens

ONE, TWO = ((1, 3, 5),), ((1, 3, 5), (1, 2, 4))


def coordinates(others, columns, shown):
    """Positions of other images; the coordinate ``shown`` tells them apart."""
    found = [places(grid, columns) for grid in others]
    for number, ids in enumerate(found, 1):
        ids[:, shown] = 10 * number
    return torch.cat(found)


def packed(call, others):
    """Tokens of other images behind those of the map."""
    batch, _, channels = call["hidden_states"].shape
    more = [tokens(grid, batch, channels) * 0.7 for grid in others]
    return call | {"hidden_states": torch.cat([call["hidden_states"], *more], 1)}


def flux(call, others):
    ids = torch.cat([call["img_ids"], coordinates(others, 3, 0)])
    return packed(call, others) | {"img_ids": ids}


def flux2(call, others):
    ids = coordinates(others, 4, 0).long().expand(len(call["img_ids"]), -1, -1)
    return packed(call, others) | {"img_ids": torch.cat([call["img_ids"], ids], 1)}


def flux3(call, others):
    """Their positions lie half as far apart, as in its pipeline."""
    ids, half = coordinates(others, 4, 3), torch.tensor([1, 0.5, 0.5, 1])
    states = noise(len(call["hidden_states"]), len(ids), 4, seed=5)
    call = call | {"image_cond_hidden_states": states, "image_cond_ids": ids * half}
    return call | {"img_ids": call["img_ids"] * half}


def qwen(call, others):
    shapes = [[*one, *others] for one in call["img_shapes"]]
    return packed(call, others) | {"img_shapes": shapes}


def fibo2(call, others):
    batch = len(call["hidden_states"])
    return call | {"context_latents": [image(grid, batch, 4) * 0.7 for grid in others]}


def joy(call, others):
    shapes = [[one[0], *others] for one in call["shape_list"]]
    count = sum(map(math.prod, shapes[0])) + 1  # and a place that only fills up
    return call | {"hidden_states": noise(len(shapes), count, 16, 1, 2, 2), "shape_list": shapes}


class Edit(NamedTuple):
    """A model, and what it is called with beside the map.

    Attributes:
        prefix: tokens that attend to everything in the first layer that sees all images.
        token: the features of a token of the first other image in the arguments; None: what is
            mixed before attention.
    """

    name: str
    add: Callable[[dict, tuple], dict]
    others: tuple
    prefix: int = TEXT
    token: Callable[[dict, int], torch.Tensor] | None = lambda call, i: call["hidden_states"][0, i]


EDITS = {
    "Kontext": Edit("FluxTransformer2DModel", flux, ONE),
    "LongCat": Edit("LongCatImageTransformer2DModel", flux, ONE),
    "FLUX.2": Edit("Flux2Transformer2DModel", flux2, TWO),
    "FLUX.3": Edit("Flux3Transformer2DModel", flux3, TWO, token=None),
    "Qwen-Image-Edit": Edit("QwenImageTransformer2DModel", qwen, ONE),
    "Qwen-Image-Edit-Plus": Edit("QwenImageTransformer2DModel", qwen, TWO),
    "Fibo 2": Edit("BriaFibo2Transformer2DModel", fibo2, TWO, 0, None),
    "JoyImage Edit Plus": Edit("JoyImageEditPlusTransformer3DModel", joy, TWO, TEXT + 1),
}
every_edit = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)


def described(edit, batch=2, grid=None, others=None):
    tiny = MODELS[edit.name]
    return edit.add(tiny.call(grid or tiny.grid, batch), edit.others if others is None else others)


def watched(model) -> list[tuple[tuple, int, torch.Tensor, torch.Tensor]]:
    """Grids, number of prefix tokens, queries and keys of each routed call from now on."""
    seen: list[Any] = []

    def see(module, args, kwargs):
        seen.append((kwargs["grid_size"], kwargs["num_prefix_tokens"], *args[:2]))

    for layer in routed_layers(model).values():
        layer.attention.register_forward_pre_hook(see, with_kwargs=True)
    return seen


@every_edit
@pytest.mark.parametrize("router", ["sampled", "learned", "grouped", "learned_grouped"])
def test_all_keys_are_stock_attention_and_fewer_are_not(edit, router):
    model, call = build(edit.name), described(edit)
    expected = run(model, call)
    for share in (1.0, 0.25):
        report = route_attention(model, config(share, router=router))
        found = run(model, call)
        assert report.calls.routed == len(report) and not report.calls.exact, report
        if share == 1.0:
            close(found, expected, 1e-5)
        else:
            assert found.isfinite().all() and (found - expected).abs().max() > 1e-3
        unroute_attention(model)


@every_edit
def test_other_images_are_maps_and_no_prefix(edit):
    model = build(edit.name)
    route_attention(model, config())
    seen = watched(model)
    run(model, described(edit))
    grids = (MODELS[edit.name].grid, *edit.others)
    found = [(grid, prefix) for grid, prefix, *_ in seen if grid == grids]
    assert found[0] == (grids, edit.prefix)
    # the layers before are those of the map alone
    assert all(grid == grids[0][1:] for grid, *_ in seen[: len(seen) - len(found)])


@pytest.mark.parametrize("name", [name for name, edit in EDITS.items() if edit.token])
def test_a_token_of_another_image_is_where_its_map_says(name):
    edit = EDITS[name]
    model, call = build(edit.name), described(edit, 1)
    first, other = math.prod(MODELS[edit.name].grid), copy.deepcopy(call)
    edit.token(other, first + 7).add_(1)
    route_attention(model, config(1.0))
    seen = watched(model)
    run(model, call)
    before = seen[0]
    seen.clear()
    run(model, other)
    assert seen[0][0][1] == edit.others[0]
    for old, new in zip(before[2:], seen[0][2:]):
        differ = (old != new).any(-1).any(1).any(0)
        assert differ.nonzero().flatten().tolist() == [edit.prefix + first + 7]


def test_windows_are_those_of_each_image():
    """Without routed keys, another image has no influence but through the text."""
    edit = EDITS["Qwen-Image-Edit-Plus"]
    model, call = build(edit.name), described(edit, 1)
    route_attention(model, config(router="window"))
    first, outs = math.prod(MODELS[edit.name].grid), []
    model.transformer_blocks[0].attn.register_forward_hook(lambda _, __, out: outs.append(out[0]))
    for _ in range(2):
        run(model, call)
        call = copy.deepcopy(call)
        edit.token(call, first + 7).add_(1)
    differ = (outs[0] != outs[1]).any(-1)[0].nonzero().flatten().tolist()
    assert first + 7 in differ and min(differ) >= first and max(differ) < first + 15


# ---- where images are not told, or differ -------------------------------------------------------


def test_images_that_differ_in_a_batch_are_seen_by_all():
    """They are a prefix, then: all tokens attend to all of theirs."""
    edit = EDITS["JoyImage Edit Plus"]
    model, call = build(edit.name), described(edit)
    call["shape_list"][1] = [call["shape_list"][1][0], (1, 2, 4), (1, 3, 5)]
    expected = run(model, call)
    report = route_attention(model, config(1.0))
    seen = watched(model)
    close(run(model, call), expected, 1e-5)
    assert report.calls.routed == len(report)
    assert seen[0][:2] == ((4, 6), TEXT + 1 + 23)


def test_what_is_no_raster_is_seen_by_all():
    edit = EDITS["FLUX.2"]
    model, call = build(edit.name), described(edit)
    call["img_ids"] = call["img_ids"].clone()
    call["img_ids"][:, -8:, 2] = 3  # of the last image
    expected = run(model, call)
    report = route_attention(model, config(1.0))
    seen = watched(model)
    close(run(model, call), expected, 1e-5)
    assert report.calls.routed == len(report)
    assert seen[0][:2] == (((1, 4, 6), (1, 3, 5)), TEXT + 8)


def test_a_controlnet_that_is_told_of_images_it_is_not_given():
    name = "QwenImageControlNetModel"
    model, call = build(name), MODELS[name].call(MODELS[name].grid, 2)
    call["img_shapes"] = [[*one, (1, 3, 5)] for one in call["img_shapes"]]
    model.pos_embed.forward = lambda shapes, *args, own=model.pos_embed.forward, **how: own(
        [one[:1] for one in shapes], *args, **how
    )
    expected = run(model, call)
    report = route_attention(model, config(1.0))
    close(run(model, call), expected, 1e-5)
    assert report.calls.routed == len(report)


@pytest.mark.parametrize("step", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("size", [(3, 5), (1, 4), (4, 1), (1, 1)])
def test_a_raster_may_be_finer_than_one(size, step):
    assert raster(places((1, *size))[:, 1:] * step + 2) == size


@pytest.mark.parametrize("stretch", [(0.5, 1.0), (1.0, 0.5), (2.0, 2.0)])
def test_what_is_stretched_is_no_raster(stretch):
    assert raster(places((1, 3, 5))[:, 1:] * torch.tensor(stretch)) is None


# ---- compiled -----------------------------------------------------------------------------------


def test_compiled_blocks_serve_images_of_other_sizes():
    edit = EDITS["Qwen-Image-Edit"]
    model = build(edit.name)
    route_attention(model, config())
    calls = [described(edit, 1), described(edit, 1, (1, 6, 4), ((1, 5, 3),))]
    expected = [run(model, call) for call in calls]
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    for call, one in zip(calls, expected, strict=True):
        close(run(model, call), one, 1e-5)
    torch.compiler.reset()
