"""Where the map lies in a forward of a diffusers model: told by its arguments, never guessed from
a number of tokens.

Each function gets a module and the arguments of its forward by name, and returns a ``Site``, or a
text that says why there is none now. Then attention is exact, and counted with that text.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from colt5_vision._torch_internals import is_compiling
from colt5_vision.swap.site import Site, image_site

__all__ = ["patch_sizes", "raster"]

Given = Mapping[str, Any]
Grid = tuple[int, int, int]
DIFFER = "maps of the batch differ in size or place"
NO_RASTER = "the positions of the tokens are no raster"
CACHED = "keys of other images come from a cache"


def latents(layout: str, argument: str = "hidden_states", patch: int | None = None):
    """Of a model that is given latents.

    Args:
        layout: of the argument, such as ``"BCTHW"``; axes but T, H, W are no matter.
        argument: its name.
        patch: latent pixels a side of a token; None: what the model's config says.
    """
    return partial(_latents, layout, argument, patch)


def _latents(layout: str, argument: str, patch: int | None, model: nn.Module, given: Given) -> Site:
    x = given[argument]
    if x.ndim < len(layout):  # an image for a model of videos
        layout = layout.replace("T", "")
    frames, height, width = (x.shape[layout.index(axis)] if axis in layout else 1 for axis in "THW")
    sizes = patch_sizes(model) if patch is None else (1, patch, patch)
    return Site((frames // sizes[0], height // sizes[1], width // sizes[2]))


def patch_sizes(model: nn.Module) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a token."""
    size = getattr(model.config, "patch_size", None) or 1
    if isinstance(size, (tuple, list)):
        return (1, *size) if len(size) == 2 else tuple(size)
    return (getattr(model.config, "patch_size_t", None) or 1, size, size)


def arguments_thw(model: nn.Module, given: Given) -> Site:
    """LTX: the size of the latents in tokens is given in words."""
    return Site((given["num_frames"], given["height"], given["width"]))


def own_map(module: nn.Module, given: Given) -> Site | str:
    """An attention module that is given the map itself, (B, C, H, W)."""
    x = given["hidden_states"]
    return image_site(*x.shape[2:]) if x.ndim == 4 else "the layer was given tokens, not a map"


def inner_latents(model: nn.Module, given: Given) -> Site | str:
    """``Transformer2DModel``, in a UNet or alone."""
    x = given["hidden_states"]
    if x.ndim != 4:
        return "the model was given classes of tokens, not a map"
    patch = model.config.patch_size if getattr(model, "is_input_patches", False) else 1
    return image_site(x.shape[2] // patch, x.shape[3] // patch)


def kandinsky3(module: nn.Module, given: Given) -> Site | str:
    """A block of Kandinsky 3, which attends to the map or to a text."""
    if given.get("context") is not None:
        return "cross-attention"
    return image_site(*given["x"].shape[2:])


def uvit(model: nn.Module, given: Given) -> Site:
    """UVit is given classes (B, H, W), which it halves if it was made to."""
    height, width = given["input_ids"].shape[1:]
    shrink = 2 if model.config.downsample else 1
    return image_site(height // shrink, width // shrink)


# ---- packed images with the positions of their tokens -------------------------------------------


def raster(places: Tensor) -> tuple[int, int] | None:
    """(H, W) of a map whose tokens lie at ``places`` (N, 2), rows and columns, in raster order;
    None if they do not.

    Places may lie closer than 1, as those of Flux 3. They may have been rounded: bfloat16 holds
    whole numbers up to 256 only.
    """
    if len(places) == 0:
        return None
    rows, columns = places[:, 0], places[:, 1]
    again = (columns[1:] == columns[0]).nonzero()
    width = len(places) if len(again) == 0 else int(again[0]) + 1
    height = len(places) // width
    if height * width != len(places):
        return None

    # as exact numbers, rounded the same way
    first = places[0].double()
    step = float((places[1] - places[0]).amax()) if len(places) > 1 else 1.0
    step = step if 0 < step < 1 else 1.0
    row = (torch.arange(height, device=places.device) * step + first[0]).to(places.dtype)
    column = (torch.arange(width, device=places.device) * step + first[1]).to(places.dtype)
    fits = torch.equal(rows.view(height, width), row[:, None].expand(-1, width))
    fits = fits and torch.equal(columns.view(height, width), column.expand(height, -1))
    return (height, width) if fits else None


def packed(model: nn.Module, given: Given, ids: str = "img_ids") -> Site | str:
    """Flux and its kin: a text, the map, and behind it other images, of which another coordinate
    than row and column is another."""
    if given.get("kv_cache_mode") is not None:  # the map has moved behind them, or they are gone
        return CACHED
    places = given.get(ids)
    text = given["encoder_hidden_states"].shape[1]
    text += int(getattr(model, "union", False))  # a ControlNet's mode is a token before the text
    return _placed(places, text)


def packed_after_text(model: nn.Module, given: Given) -> Site | str:
    """Krea 2: positions of the text and of the map in one tensor."""
    text = given["encoder_hidden_states"].shape[1]
    return _placed(given["position_ids"][..., text:, :], text)


def flux3(model: nn.Module, given: Given) -> Site | str:
    """Flux 3: reference images have positions of their own, and stand behind."""
    site, others = packed(model, given), given.get("image_cond_ids")
    if isinstance(site, str) or others is None:
        return site
    tokens = site.tokens + site.behind + len(others)
    if site.behind == 0:
        site = site._replace(more=(*site.more, *_images(others)))
    return site._replace(behind=tokens - site.tokens)


def _placed(places: Tensor | None, text: int) -> Site | str:
    if is_compiling():
        return "a compiled graph cannot look at the positions of the tokens"
    if places is None:
        return "the model was given no positions of the tokens"
    if places.ndim == 3:
        if not torch.equal(places, places[:1].expand_as(places)):
            return DIFFER
        places = places[0]
    images = _images(places)
    if not images:
        return NO_RASTER
    site = Site(images[0], text, more=images[1:])
    return site._replace(behind=len(places) - site.tokens)


def _images(places: Tensor) -> tuple[Grid, ...]:
    """Grids of the images whose tokens lie at ``places`` (N, 3 or 4), one image after the other, up
    to the first that is no raster."""
    which = torch.cat([places[:, :1], places[:, 3:]], 1)
    ends = (which[1:] != which[:-1]).any(1).nonzero().flatten().add(1).tolist()
    grids: list[Grid] = []
    for start, end in zip([0, *ends], [*ends, len(places)]):
        grid = raster(places[start:end, 1:3])
        if grid is None:
            break
        grids.append((1, *grid))
    return tuple(grids)


# ---- images whose sizes are told in words -------------------------------------------------------


def shapes_first(model: nn.Module, given: Given) -> Site | str:
    """Qwen-Image and its kin: a text, the map, and the images to edit behind it."""
    shapes, tokens = given["img_shapes"], given["hidden_states"].shape[1]
    site = _listed([one if isinstance(one[0], Sequence) else [one] for one in shapes], tokens)
    if isinstance(site, str):
        return site
    text = given["encoder_hidden_states"].shape[1]
    return site._replace(before=text, behind=tokens - site.tokens)


def _listed(shapes: Sequence[Sequence[Sequence[int]]], tokens: int) -> Site | str:
    """The first image of each sample, with the others if all samples have the same and the tokens
    hold them (a ControlNet's do not)."""
    told = {tuple(tuple(one) for one in sample) for sample in shapes}
    if len({sample[0] for sample in told}) != 1:
        return DIFFER
    first, *more = told.pop()
    site = Site(first, more=tuple(more))
    return Site(first) if told or site.tokens > tokens else site


def shapes_first_alone(model: nn.Module, given: Given) -> Site | str:
    """Nucleus: the map, and its text behind it as keys only."""
    site = shapes_first(model, given)
    return site if isinstance(site, str) else Site(site.grid)


def shapes_last(model: nn.Module, given: Given) -> Site | str:
    """Qwen-Image 2.1: the images to edit and the text, and the map behind them."""
    told = {tuple(one[-1]) for one in given["img_shapes"]}
    return Site(told.pop()) if len(told) == 1 else DIFFER


def shape_list(model: nn.Module, given: Given) -> Site | str:
    """JoyImage Edit Plus: the map is the first of several images."""
    return _listed(given["shape_list"], given["hidden_states"].shape[1])


def z_image(model: nn.Module, given: Given) -> Site | str:
    """Z-Image: a list of maps (C, F, H, W); what fills them up and the text stand behind."""
    maps = given["x"]
    if not all(isinstance(one, Tensor) for one in maps):
        return "several images a sample"
    if len({one.shape for one in maps}) != 1:
        return DIFFER
    patch, frames = given.get("patch_size", 2), given.get("f_patch_size", 1)
    _, t, height, width = maps[0].shape
    return Site((t // frames, height // patch, width // patch))


def cosmos3(model: nn.Module, given: Given) -> Site | str:
    """Cosmos 3: what is generated stands behind what is understood."""
    shapes = given["vision_token_shapes"]
    others = given.get("sound_tokens") is not None or given.get("action_tokens") is not None
    if len(shapes) != 1 or others:
        return "several maps, sounds or actions in one sequence"
    return Site(tuple(shapes[0]))


# ---- latents, and other tokens that must be counted ---------------------------------------------


def lumina2(model: nn.Module, given: Given) -> Site | str:
    """Lumina 2 puts the map right behind each caption's last valid token."""
    if is_compiling():
        return "a compiled graph cannot look at the lengths of the captions"
    lengths = given["encoder_attention_mask"].sum(1)
    if bool((lengths != lengths[0]).any()):
        return DIFFER
    return _latents("BCHW", "hidden_states", None, model, given)


def fibo2(model: nn.Module, given: Given) -> Site | str:
    """Bria Fibo 2: the gist of the text in front, or behind all if a batch pads it; images to edit
    behind the map."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    site = _latents("BCHW", "hidden_states", None, model, given)
    text, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
    if mask is not None and is_compiling():
        return "a compiled graph cannot look at the lengths of the texts"
    lengths = [text.shape[2]] * len(text) if mask is None else mask.sum(1).tolist()
    config, patch = model.config, model.config.patch_size
    gists = compute_gist_count(
        lengths,
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    images = given.get("context_latents") or []
    more = tuple((1, x.shape[2] // patch, x.shape[3] // patch) for x in images)
    if min(gists) == max(gists):
        return site._replace(before=gists[0], more=more)
    return site._replace(behind=max(gists), more=more)


def framepack(model: nn.Module, given: Given) -> Site | str:
    """HunyuanVideo Framepack: earlier frames at three scales in front, image and text behind."""
    site = _latents("BCTHW", "hidden_states", None, model, given)
    frames, height, width = patch_sizes(model)
    before = 0
    for name, scale in (("clean", 1), ("history_2x", 2), ("history_4x", 4)):
        x = given.get(f"latents_{name}")
        if x is not None:
            sides = zip(x.shape[2:], (frames * scale, height * scale, width * scale))
            before += math.prod(-(-side // step) for side, step in sides)
    mask = given["encoder_attention_mask"]
    if len(mask) == 1 and is_compiling():
        return "a compiled graph cannot look at the length of the text"
    text = int(mask.sum()) if len(mask) == 1 else mask.shape[1]  # a single one is cut to its length
    return site._replace(before=before, behind=given["image_embeds"].shape[1] + text)


def kandinsky5(model: nn.Module, given: Given) -> Site | str:
    """Kandinsky 5, unless it attends to blocks of its own."""
    if given.get("sparse_params") is not None:
        return "the model attends to blocks of its own (nabla)"
    return _latents("BTHWC", "hidden_states", None, model, given)


def joy_image(model: nn.Module, given: Given) -> Site:
    """JoyImage Edit: one item, or several (B, N, C, T, H, W), which are frames to the model."""
    x = given["hidden_states"]
    if x.ndim < 6:
        return _latents("BCTHW", "hidden_states", None, model, given)
    frames, height, width = patch_sizes(model)
    return Site((x.shape[1] * x.shape[3] // frames, x.shape[4] // height, x.shape[5] // width))


def hidream(model: nn.Module, given: Given) -> Site | str:
    """HiDream: latents, or patches that are filled up to a fixed number with their sizes."""
    if given["hidden_states"].ndim == 4:
        return _latents("BCHW", "hidden_states", None, model, given)
    sizes = {tuple(int(side) for side in one) for one in given["img_sizes"]}
    return image_site(*sizes.pop()) if len(sizes) == 1 else DIFFER
