"""Relative positions of timm's attention modules, for the pairs of a query and its keys only.

timm makes the whole N x N matrix before it attends. While a layer is routed, ``no_bias`` stands in
for what makes it, and the functions here give what a pair needs.
"""

from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor, nn

from colt5_vision.ops.routed_window_attention.gathered import PairBias
from colt5_vision.swap.site import Site

from .biases import decomposed_bias, padded_bias, table_bias

__all__ = ["beit_bias", "rel_pos_bias", "sam_bias"]


def beit_bias(layer: nn.Module, q: Tensor, site: Site | None) -> PairBias | None:
    """BEiT's table, of each layer."""
    table = layer.relative_position_bias_table
    if table is None:
        return None
    return table_bias(table.t(), layer.window_size, 1, site, q.device)


def rel_pos_bias(layer: nn.Module, q: Tensor, site: Site | None) -> PairBias | None:
    """The relative positions of ViTs with ``rel_pos`` and of CoAtNet."""
    rel_pos = layer.rel_pos
    if isinstance(rel_pos, RelPosBias):
        table, prefix = rel_pos.relative_position_bias_table.t(), rel_pos.prefix_tokens
        return table_bias(table, rel_pos.window_size, prefix, site, q.device)
    if isinstance(rel_pos, RelPosMlp):
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log))
        table = table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
        table = table.flatten(0, -2).t()
        prefix = rel_pos.prefix_tokens
        own = table_bias(table, rel_pos.window_size, 0, site, q.device)
        return own if prefix == 0 else padded_bias(own, prefix)
    if isinstance(rel_pos, RelPosBiasTf):  # it counts from the query to the key
        table = rel_pos.relative_position_bias_table.flatten(1).flip(1)
        return table_bias(table, rel_pos.window_size, 0, site, q.device)
    return None


def sam_bias(layer: nn.Module, q: Tensor, site: Site | None) -> PairBias | None:
    """SAM's decomposed relative positions: a part by row and one by column, of each query."""
    if not hasattr(layer, "rel_pos_h"):
        return None
    _, height, width = site.grid
    rows = get_rel_pos(height, height, layer.rel_pos_h)
    columns = get_rel_pos(width, width, layer.rel_pos_w)
    return decomposed_bias(q, rows, columns, site)
