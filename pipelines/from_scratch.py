"""diffusers UNets to train with CoLT5's light and heavy branches, in place of attention that has
weights already."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from colt5_vision._torch_internals import put_hook
from colt5_vision.attention import ConditionalRoutedImageAttention
from colt5_vision.checks import (
    TokenCount,
    check_float_tensor,
    check_int,
    check_positive,
)
from colt5_vision.init import init_weights
from colt5_vision.swap.config import RoutedAttentionConfig
from colt5_vision.swap.site import EntranceHook, ExitHook, MarkHook, Scope
from colt5_vision.swap.verb import Chosen, plan, routed_layers
from colt5_vision.swap.wrappers import unwrapped

from . import sites

__all__ = ["ConditionalRoutedAttentionBlock", "build_routed_attention"]

_ENTRANCE, _EXIT, _MARK = (f"colt5_vision.blocks.{name}" for name in ("entrance", "exit", "mark"))
_OF_THE_LAYER = (
    "dim",
    "channel_first",
    "norm_num_groups",
    "eps",
    "residual_connection",
    "rescale_output_factor",
)


class ConditionalRoutedAttentionBlock(nn.Module):
    """What diffusers' ``Attention`` does to itself, with conditionally routed attention and weights
    of its own.

    ``(dropout(attention(group_norm(x))) + x) / rescale_output_factor`` for a map x, the norm and
    the residual where ``Attention`` has them. The map comes as (B, C, H, W), or as (B, N, C) inside
    a transformer whose map size :func:`build_routed_attention` has hooked.

    Args:
        dim: channels C.
        num_heavy_tokens_kv: routed keys that every token (or, with ``num_heavy_tokens_q``, every
            routed one) sees, an int >= 1 (that many) or a float in (0, 1] (that share of the map).
        heads, dim_head: heads and their width, of the light and of the heavy branch alike unless
            ``attention`` says otherwise.
        norm_num_groups, eps: of the group norm; None: no norm besides the attention's own.
        residual_connection: add the input.
        rescale_output_factor: divide by it, at the end.
        dropout: of the attention's output.
        device, dtype: of the parameters.
        attention: further arguments of :class:`~colt5_vision.ConditionalRoutedImageAttention`:
            ``fusion``, ``light_window_size``, ``num_heavy_tokens_q``, ``rotary_emb``, ...

    Attributes:
        scope: tells the (H, W) behind (B, N, C); None: only maps (B, C, H, W) are taken.

    Raises:
        TypeError, ValueError: for an argument that does not fit.

    Source: CoLT5 (arXiv 2303.09752) section 3; ADM (arXiv 2105.05233) for where the attention sits.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_kv: TokenCount,
        heads: int = 8,
        dim_head: int = 64,
        norm_num_groups: int | None = None,
        eps: float = 1e-5,
        residual_connection: bool = False,
        rescale_output_factor: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_int("dim", dim)
        check_int("heads", heads)
        check_int("dim_head", dim_head)

        # as the block that it stands in for
        self.residual_connection = residual_connection
        self.rescale_output_factor = check_positive("rescale_output_factor", rescale_output_factor)
        self.group_norm = None
        if norm_num_groups is not None:
            if dim % check_int("norm_num_groups", norm_num_groups):
                raise ValueError(
                    f"norm_num_groups: {dim} channels are not divisible by {norm_num_groups} groups"
                )
            self.group_norm = nn.GroupNorm(norm_num_groups, dim, eps=eps, **factory)

        # attention of a whole map; both branches are as wide as that block
        if attention.pop("channel_first", True) is not True:
            raise ValueError("channel_first: expected True, the block gets maps (B, C, H, W)")
        branches = {
            "light_heads": heads,
            "light_dim_head": dim_head,
            "heavy_heads": heads,
            "heavy_dim_head": dim_head,
        }
        self.attention = ConditionalRoutedImageAttention(
            dim, num_heavy_tokens_kv=num_heavy_tokens_kv, **(branches | attention), **factory
        )

        self.dropout = nn.Dropout(dropout)
        self.scope: Scope | None = None

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did."""
        init_weights(self)

    def extra_repr(self) -> str:
        return (
            f"residual_connection={self.residual_connection}, "
            f"rescale_output_factor={self.rescale_output_factor}"
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **cross_attention_kwargs,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (B, C, H, W), or (B, N, C) in raster order of a map whose size is known;
                any H and W.
            encoder_hidden_states, attention_mask: must be None.
            temb, cross_attention_kwargs: of no use here, as in the ``Attention`` replaced.

        Returns:
            The shape of ``hidden_states``.

        Raises:
            TypeError, ValueError: for an argument that does not fit; (B, N, C)
                of a map of unknown size.
        """
        for name, value in (
            ("encoder_hidden_states", encoder_hidden_states),
            ("attention_mask", attention_mask),
        ):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None, a ConditionalRoutedAttentionBlock lets a whole map "
                    "attend to itself; "
                    f"got {type(value).__name__}"
                )

        # a map, whatever came
        x = check_float_tensor("hidden_states", hidden_states)
        if x.ndim == 3:
            x = x.transpose(1, 2).unflatten(2, self._size(x.shape[1]))
        elif x.ndim != 4:
            raise ValueError(
                f"hidden_states: expected (B, C, H, W) or (B, N, C), got shape {tuple(x.shape)}"
            )
        if x.shape[1] != self.attention.dim:
            raise ValueError(
                f"hidden_states: expected {self.attention.dim} channels, "
                f"got shape {tuple(hidden_states.shape)}"
            )

        # attend, and give back what came
        if self.group_norm is not None:
            x = self.group_norm(x)
        x = self.dropout(self.attention(x))
        if hidden_states.ndim == 3:
            x = x.flatten(2).transpose(1, 2)
        if self.residual_connection:
            x = x + hidden_states
        return x / self.rescale_output_factor

    def _size(self, num_tokens: int) -> tuple[int, int]:
        if self.scope is None:
            raise ValueError(
                f"hidden_states: expected a map (B, C, H, W), got {num_tokens} tokens (B, N, C) "
                "and nothing that tells the size of their map; build_routed_attention sets that up "
                "inside a UNet2DConditionModel"
            )
        now = self.scope.serve(self)
        if now.site is None or now.site.tokens != num_tokens:
            known = now.reason if now.site is None else f"its map has {now.site.grid[1:]} tokens"
            raise ValueError(
                "hidden_states: expected the tokens of the map that the Transformer2DModel around "
                f"this block was called with, got {num_tokens} tokens: {known}; call the "
                "transformer, not its blocks"
            )
        return now.site.grid[1:]


def build_routed_attention(
    model: UNet2DModel | UNet2DConditionModel,
    *,
    num_heavy_tokens_kv: TokenCount,
    layers: Sequence[int | str] | None = None,
    **attention,
) -> list[str]:
    """Replace the self-attention of a UNet by :class:`ConditionalRoutedAttentionBlock`, in place,
    to train it so.

    The weights of the attention replaced are gone; to keep them use
    :func:`~colt5_vision.route_attention`. Do it before wrapping or compiling the model and before
    making its optimizer. Call it again for other settings in other layers. A UNet loaded with
    ``from_pretrained`` knows nothing of it: build, then ``load_state_dict``.

    Args:
        model: a ``UNet2DModel`` (layers that get maps) or a ``UNet2DConditionModel`` (``attn1`` of
            its transformers too). Cross-attention and the layers that GLIGEN adds stay.
        num_heavy_tokens_kv: routed keys, an int >= 1 (that many) or a float in (0, 1] (that share
            of each map).
        layers: names, patterns (``"up_blocks.*"``, see :mod:`fnmatch`) or indices among those that
            can be replaced; None: all.
        attention: further arguments of :class:`ConditionalRoutedAttentionBlock`, thus of
            :class:`~colt5_vision.ConditionalRoutedImageAttention`; ``heads`` and ``dim_head``
            default to those of the layer replaced.

    Returns:
        Names of the layers replaced.

    Raises:
        TypeError, ValueError: for an argument that does not fit, or saying why no layer can be
            replaced; nothing is changed then.

    Source: CoLT5 (arXiv 2303.09752).
    """
    model = unwrapped(model)
    if not isinstance(model, (UNet2DModel, UNet2DConditionModel)):
        raise TypeError(
            f"model: expected a UNet2DModel or UNet2DConditionModel, got {type(model).__name__}"
        )
    if fixed := [name for name in _OF_THE_LAYER if name in attention]:
        raise TypeError(
            f"{', '.join(fixed)}: expected no such argument, it is that of the layer replaced"
        )
    if routed_layers(model):
        raise ValueError("model: its pretrained attention is routed, call unroute_attention first")

    # which layers, and what takes their places
    wanted = plan(model, RoutedAttentionConfig(layers=layers), must_route=False).chosen
    chosen = {name: one for name, one in wanted.items() if _obstacle(model, one) is None}
    refused = {name: _obstacle(model, wanted[name]) for name in wanted if name not in chosen}
    if refused and (layers is not None or not chosen):
        name, reason = next(iter(refused.items()))
        raise ValueError(f"layers: {name} of {type(model).__name__} cannot be replaced: {reason}")
    blocks = {
        name: _block(model.get_submodule(name), name, num_heavy_tokens_kv, attention)
        for name in chosen
    }

    # nothing can fail from here on
    for name, one in chosen.items():
        if one.spec.entrance != name:  # a layer that gets tokens
            blocks[name].scope = _scope(model.get_submodule(one.spec.entrance))
        around, _, last = name.rpartition(".")
        setattr(model.get_submodule(around), last, blocks[name])
    return list(chosen)


def _obstacle(model: nn.Module, one: Chosen) -> str | None:
    """Why a layer that can be routed cannot be replaced."""
    if one.spec.place != "map":
        return "it attends to more than the map"
    if getattr(model.get_submodule(one.path), "spatial_norm", None) is not None:
        return "its norm is conditioned on another map"
    return None


def _block(
    attn: Attention, name: str, num_heavy_tokens_kv: TokenCount, attention: dict
) -> ConditionalRoutedAttentionBlock:
    """A block of the shape of a layer."""
    norm, weight = attn.group_norm, next(attn.to_q.parameters())
    own = {
        "heads": attn.heads,
        "dim_head": attn.inner_dim // attn.heads,
        "norm_num_groups": None if norm is None else norm.num_groups,
        "eps": 1e-5 if norm is None else norm.eps,
        "residual_connection": attn.residual_connection,
        "rescale_output_factor": attn.rescale_output_factor,
        "dropout": attn.dropout,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    try:
        block = ConditionalRoutedAttentionBlock(
            attn.query_dim, num_heavy_tokens_kv=num_heavy_tokens_kv, **(own | attention)
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (for layer {name}, {attn.query_dim} channels)") from error
    return block.train(attn.training)


def _scope(transformer: nn.Module) -> Scope:
    """What tells the blocks in a transformer the size of their map; one for all of them."""
    found = transformer._forward_pre_hooks.get(_ENTRANCE)
    if found is not None:
        return found.scope
    scope = Scope()
    put_hook(transformer, _ENTRANCE, EntranceHook(transformer, scope, sites.inner_latents))
    put_hook(transformer, _EXIT, ExitHook(scope), after=True)
    for block in transformer.transformer_blocks:
        put_hook(block, _MARK, MarkHook([scope]))
    return scope
