"""timm's attention modules, routed: each family's class keeps timm's forward and reroutes its attention."""

from functools import partial

import torch
from timm.layers import Attention, AttentionRope
from timm.models import beit, eva, vision_transformer_sam, volo
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor, nn

from colt5_vision.pretrained import PretrainedRoutedAttention
from colt5_vision.reroute import RerouteAttention, autocast_like, read_mask


class RoutedSelfAttention:
    """The part common to all families, in front of a timm attention in the order of resolution.

    The swap sets ``routing``, a :class:`~colt5_vision.pretrained.PretrainedRoutedAttention`, and what ``_layout`` needs.
    """

    fused_attn = property(lambda self: True)  # the branch with scaled_dot_product_attention
    teacher = None  # distillation: called in place of the routed attention

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        with RerouteAttention(partial(self._attend, x)):
            return super().forward(x, *args, **kwargs)

    def _layout(self, x: Tensor) -> tuple[tuple[int, int], int]:
        """Map size and number of prefix tokens of an input."""
        raise NotImplementedError

    def _pair_bias(self, q: Tensor, grid_size: tuple[int, int]):
        """The module's own relative position bias, as a function of query and key, or None."""

    def _attend(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        if dropout_p > 0:
            raise ValueError(f"attn_drop: routed attention has no dropout of its weights, got {dropout_p}")
        if is_causal:
            raise ValueError("is_causal: expected False, routed attention over a map is not causal")
        grid_size, prefix = self._layout(x)
        shape = query.shape
        q, k, v = (t.reshape(x.shape[0], -1, *t.shape[-2:]) for t in (query, key, value))
        q, k, v = autocast_like(q, k, v)
        if attn_mask is not None and attn_mask.ndim == 0:  # BEiT's own bias, see there
            attn_mask = None
        key_mask, given = read_mask(attn_mask, q)
        own = self._pair_bias(q, grid_size)
        pair_bias = given if own is None else own if given is None else lambda i, j: own(i, j) + given(i, j)
        call = {
            "grid_size": grid_size,
            "num_prefix_tokens": prefix,
            "features": x.flatten(1, -2)[:, prefix:],
            "key_mask": key_mask,
            "pair_bias": pair_bias,
            "scale": scale,
        }
        if self.teacher is not None:
            return self.teacher(self, q, k, v, **call).reshape(shape)
        return self.routing(q, k, v, **call).reshape(shape)


class RoutedTokens(RoutedSelfAttention):
    """Attention over (B, P + N, C): the map's size comes from the model's patch embedding."""

    def _layout(self, x: Tensor) -> tuple[tuple[int, int], int]:
        tokens = x.shape[1] - self.prefix
        found = self.map_size.for_tokens(self, tokens)
        if found is None:
            raise ValueError(
                f"x: the size of the map behind these {tokens} tokens is unknown; a routed block runs once for each "
                f"pass through the model's patch embedding (the last one made {self.map_size.size}), not on its own nor "
                "after two of them in a row, and is checkpointed with use_reentrant=False"
            )
        return found.size, self.prefix


class RoutedMap(RoutedSelfAttention):
    """Attention over (B, H, W, C)."""

    def _layout(self, x: Tensor) -> tuple[tuple[int, int], int]:
        return (x.shape[1], x.shape[2]), 0


class RoutedAttention(RoutedTokens, Attention):
    """``timm.layers.Attention``: ViT, DeiT-3, DINOv2, SigLIP, AIMv2."""


class RoutedAttentionRope(RoutedTokens, AttentionRope):
    """``timm.layers.AttentionRope``; keys are routed after rotation."""


class RoutedEvaAttention(RoutedTokens, eva.EvaAttention):
    """EVA, EVA-02, DINOv3; keys are routed after rotation."""


class RoutedBeitAttention(RoutedTokens, beit.Attention):
    """BEiT: the relative position table is read for the pairs of a query and its keys only."""

    def _get_rel_pos_bias(self) -> Tensor:
        return self.relative_position_bias_table.new_zeros(())  # never the whole matrix

    def _pair_bias(self, q: Tensor, grid_size: tuple[int, int]):
        table = self.relative_position_bias_table
        if table is None:
            return None
        height, width = self.window_size
        if tuple(grid_size) != (height, width):
            raise ValueError(
                f"x: expected the {height} x {width} tokens of the relative position table, got "
                f"{grid_size[0]} x {grid_size[1]}; call model.set_input_size first"
            )
        heads = torch.arange(table.shape[1], device=q.device).view(1, -1, 1, 1, 1)
        from_class, to_class, own_class = (self.num_relative_distance - n for n in (3, 2, 1))

        def bias(i: Tensor, j: Tensor) -> Tensor:
            y = torch.div(i - 1, width, rounding_mode="floor") - torch.div(j - 1, width, rounding_mode="floor")
            x = (i - 1) % width - (j - 1) % width
            entry = (y + height - 1) * (2 * width - 1) + x + width - 1
            entry = torch.where(j == 0, to_class, torch.where(i == 0, from_class, entry))
            entry = torch.where((i == 0) & (j == 0), own_class, entry)
            return table.t()[heads, entry]

        return bias


class RoutedSamAttention(RoutedMap, vision_transformer_sam.Attention):
    """SAM's global attention: decomposed relative positions are added for the pairs of a query and its keys only."""

    use_rel_pos = property(lambda self: False)  # the whole matrix is never made

    def _pair_bias(self, q: Tensor, grid_size: tuple[int, int]):
        if not self.__dict__["use_rel_pos"]:
            return None
        height, width = grid_size
        rows = get_rel_pos(height, height, self.rel_pos_h)
        columns = get_rel_pos(width, width, self.rel_pos_w)
        query = q.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", query, rows.to(q.dtype)).flatten(2, 3)
        by_column = torch.einsum("bnhwc,wkc->bnhwk", query, columns.to(q.dtype)).flatten(2, 3)
        b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1, 1)
        h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1, 1)

        def bias(i: Tensor, j: Tensor) -> Tensor:
            return by_row[b, h, i, torch.div(j, width, rounding_mode="floor")] + by_column[b, h, i, j % width]

        return bias


class RoutedVoloAttention(RoutedMap, volo.Attention):
    """VOLO's self-attention over (B, H, W, C)."""


FAMILIES = {
    Attention: RoutedAttention,
    AttentionRope: RoutedAttentionRope,
    eva.EvaAttention: RoutedEvaAttention,
    beit.Attention: RoutedBeitAttention,
    vision_transformer_sam.Attention: RoutedSamAttention,
    volo.Attention: RoutedVoloAttention,
}
ORIGINALS = {routed: family for family, routed in FAMILIES.items()}


def original_type(module: nn.Module) -> type:
    """timm's class of a module, routed or not."""
    return ORIGINALS.get(type(module), type(module))


def routed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The routed attention modules of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, RoutedSelfAttention)}


def routed_layers(model: nn.Module) -> dict[str, PretrainedRoutedAttention]:
    """Names of the routed attention modules of a model, and what routes them."""
    return {name: m.routing for name, m in routed_modules(model).items()}
