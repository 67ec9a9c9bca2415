"""Grids from the places of tokens, where a model is given those."""

import torch
from torch import Tensor

from .._torch_internals import is_compiling


def raster_grid(places: Tensor, valid: Tensor | None = None) -> tuple[int, int] | str:
    """(H, W) of maps whose tokens lie at ``places`` in raster order, the same for a whole batch; or
    why there is none.

    Looks at the places: on an accelerator it waits for them.

    Args:
        places: (B, N, 2), rows and columns, integers or whole numbers.
        valid: (B, N) bool, False for tokens that only fill up; they must be the last ones.
    """
    if is_compiling():
        return "a compiled graph cannot look at the places of the tokens"
    places = places.long()
    if valid is not None:
        count = valid.sum(-1)
        if bool((count != count[0]).any()):
            return "maps of the batch have different sizes"
        if not bool(valid[:, : int(count[0])].all()):
            return "tokens that only fill up are not the last ones"
        places = places[:, : int(count[0])]
    if places.shape[1] == 0:
        return "there are no tokens of a map"
    first = places[:, :1]
    height, width = (places[0] - first[0]).amax(0).add(1).tolist()
    if places.shape[1] != height * width:
        return "the places of the tokens are not all those of a map"
    place = torch.arange(height * width, device=places.device)
    raster = torch.stack([place // width, place % width], -1)
    if not torch.equal(places - first, raster.expand_as(places)):
        return "the tokens are not in raster order, or maps of the batch differ"
    return height, width
