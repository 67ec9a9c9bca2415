"""A diffusers attention processor to set by hand; ``route_attention`` needs none."""

from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from colt5_vision.swap.adapter import LayerSpec, Place
from colt5_vision.swap.config import RoutedAttentionConfig
from colt5_vision.swap.learned import LEARNED
from colt5_vision.swap.report import Calls
from colt5_vision.swap.reroute import RerouteMode, RoutedLayer
from colt5_vision.swap.site import Pass, Scope, Site, image_site
from colt5_vision.swap.switches import Switches

__all__ = ["RoutedAttnProcessor"]


class RoutedAttnProcessor:
    """Runs another processor with its ``scaled_dot_product_attention`` routed.

    For single layers, of a model of your own: ``colt5_vision.route_attention`` routes whole models
    and needs no processor. Projections, norms and residuals are those of the other processor. What
    cannot be routed is exact, and counted.

    Args:
        config: None: :class:`RoutedAttentionConfig` as it is by default. Its layers and timesteps
            are no matter here.
        exact: the other processor; None: ``AttnProcessor2_0``. It must call torch's
            ``scaled_dot_product_attention``.
        grid_size: (H, W) of the map, for a layer that is given tokens (B, N, C); None: it is given
            maps (B, C, H, W).
        place: where other tokens stand in the layer's sequence, see
            :data:`~colt5_vision.swap.adapter.Place`. With ``"map"``, a call with
            ``encoder_hidden_states`` is cross-attention.

    Attributes:
        calls: live :class:`~colt5_vision.swap.report.Calls`.

    Raises:
        TypeError, ValueError: for an argument that does not fit.

    Source: CoLT5 (arXiv 2303.09752).
    """

    def __init__(
        self,
        config: RoutedAttentionConfig | None = None,
        *,
        exact: Any = None,
        grid_size: tuple[int, int] | None = None,
        place: Place = "map",
    ):
        config = RoutedAttentionConfig() if config is None else config
        if not isinstance(config, RoutedAttentionConfig):
            raise TypeError(
                f"config: expected a RoutedAttentionConfig, got {type(config).__name__}"
            )
        if config.router in LEARNED:
            raise ValueError(
                f"config: router={config.router!r} needs route_attention, got a processor"
            )
        if place not in ("map", "before", "behind"):
            raise ValueError(f"place: expected 'map', 'before' or 'behind', got {place!r}")
        self.config, self.grid_size, self.place = config, grid_size, place
        self.exact = AttnProcessor2_0() if exact is None else exact
        spec = LayerSpec(place=place)
        self.routed = RoutedLayer("attn", spec, config, config.attention(), Scope(), Switches())

    @property
    def calls(self) -> Calls:
        return self.routed.calls

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args,
        temb: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: list[Tensor] | None = None,
        ip_adapter_masks: Tensor | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attend, as the other processor would; returns what it returns.

        Args:
            attn: the layer.
            hidden_states: (B, C, H, W), or (B, N, C).
            encoder_hidden_states, attention_mask, args, temb, image_rotary_emb, ip_hidden_states,
                ip_adapter_masks, kwargs: for the other processor.
        """
        # diffusers passes on what it finds by name in this signature
        named = {
            "temb": temb,
            "image_rotary_emb": image_rotary_emb,
            "ip_hidden_states": ip_hidden_states,
            "ip_adapter_masks": ip_adapter_masks,
        }
        named = {name: x for name, x in named.items() if x is not None} | kwargs
        now = Pass(self._site(hidden_states, encoder_hidden_states))
        with RerouteMode(self.routed, attn, now):
            return self.exact(
                attn, hidden_states, encoder_hidden_states, attention_mask, *args, **named
            )

    def _site(self, x: Tensor, text: Tensor | None) -> Site | str:
        if text is not None and self.place == "map":
            return "cross-attention"
        if x.ndim == 4:
            return image_site(*x.shape[2:])
        if self.grid_size is None:
            return "the layer was given tokens, and grid_size was not told"
        return image_site(*self.grid_size)
