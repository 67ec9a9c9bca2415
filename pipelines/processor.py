"""A diffusers attention processor that routes self-attention over a map, around the processor it replaces."""

import inspect
from functools import partial
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName
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
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from colt5_vision.checks import check_int
from colt5_vision.pretrained import PretrainedRoutedAttention
from colt5_vision.reroute import MapSize, Pass, RerouteAttention, autocast_like

from .config import RoutedAttentionConfig
from .sizes import Timestep

__all__ = ["RoutedAttnProcessor"]

ATTENTIONS = (Attention, FluxAttention)
"""diffusers' attention modules that can be routed."""
# what calls scaled_dot_product_attention with the projections of the layer ...
_REROUTABLE = (
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    JointAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
# of these, only with the native backend
_DISPATCHING = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)
# ... and what computes the same as AttnProcessor2_0 in another way
_EQUIVALENT = (AttnProcessor, SlicedAttnProcessor, XFormersAttnProcessor)
PROCESSORS = _REROUTABLE + _EQUIVALENT
"""Processors that a :class:`RoutedAttnProcessor` can stand in for."""


def is_joint(attn: nn.Module) -> bool:
    """Whether a text, projected by the layer itself, attends together with the map (SD3, Flux's double blocks)."""
    return getattr(attn, "add_q_proj", None) is not None


def adds_keys(attn: nn.Module) -> bool:
    """Whether a text gives keys and values only (UnCLIP, Kandinsky)."""
    return getattr(attn, "add_k_proj", None) is not None and not is_joint(attn)


class RoutedAttnProcessor(nn.Module):
    """Routed self-attention with the weights of the layer it is set on.

    It runs the processor it replaces with ``scaled_dot_product_attention`` rerouted, so projections (fused ones and LoRA
    too), norms, rotary positions, residuals and text tokens are what they were. Where routing is not possible or not
    asked for, the replaced processor runs as it is: cross-attention, a mask, projections added for keys and values, a
    map of unknown size, fewer than ``config.min_tokens`` tokens, full attention by ``config.schedule``.

    The layer's input is (B, C, H, W), or (B, N, C) where :func:`enable_routed_attention` has told where the size of the
    map comes from. One instance serves one layer.

    Args:
        config: None: :class:`RoutedAttentionConfig` as it is by default.
        exact: the processor it stands in for; None: what the layer has by default, found at the first call.
        dim: channels of the layer's keys, for ``router="learned"``.
        device, dtype: of a learned router's parameters.

    Attributes:
        routing: :class:`~colt5_vision.pretrained.PretrainedRoutedAttention`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: CoLT5 (arXiv 2303.09752); DESIGN sections 2.2 and 2.3.
    """

    teacher = None  # distillation: called in place of the routed attention

    def __init__(
        self,
        config: RoutedAttentionConfig | None = None,
        *,
        exact: Any = None,
        dim: int | None = None,
        device=None,
        dtype=None,
    ):
        nn.Module.__init__(self)  # of a processor for IP-Adapters, the next in line is diffusers' own
        config = RoutedAttentionConfig() if config is None else config
        if not isinstance(config, RoutedAttentionConfig):
            raise TypeError(f"config: expected a RoutedAttentionConfig, got {type(config).__name__}")
        if exact is not None and type(exact) not in PROCESSORS:
            raise ValueError(f"exact: expected one of {[p.__name__ for p in PROCESSORS]}, got {type(exact).__name__}")
        self.config = config
        self.exact = exact
        self.routing = PretrainedRoutedAttention(
            window_size=config.window_size,
            num_heavy_tokens_kv=config.num_heavy_tokens_kv,
            num_heavy_tokens_q=config.num_heavy_tokens_q,
            router=config.router,
            dim=check_int("dim", dim) if config.router == "learned" else None,
            device=device,
            dtype=dtype,
        )
        self.map_size: MapSize | None = None
        self.timestep: Timestep | None = None

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
        """Attend, as the replaced processor would.

        Args:
            attn: the layer.
            hidden_states: (B, C, H, W), or (B, N, C) with N = H * W in raster order; in single-stream blocks of Flux
                (B, P + N, C), the text in front.
            encoder_hidden_states: (B, P, C'), the text of joint attention; of cross-attention otherwise.
            attention_mask: given, attention is exact.
            args, temb, image_rotary_emb, ip_hidden_states, ip_adapter_masks, kwargs: for the replaced processor, those
                that it takes.

        Returns:
            What the replaced processor returns: the shape of ``hidden_states``, and with a joint text that of
            ``encoder_hidden_states`` as well.

        Raises:
            RuntimeError: if the replaced processor did not call torch's own ``scaled_dot_product_attention``.
            ValueError: from checkpointing that does not tell which map is recomputed.
        """
        # diffusers passes on what it finds by name in this signature
        named = {
            "temb": temb,
            "image_rotary_emb": image_rotary_emb,
            "ip_hidden_states": ip_hidden_states,
            "ip_adapter_masks": ip_adapter_masks,
            **kwargs,
        }
        named = {name: value for name, value in named.items() if value is not None}
        if self.exact is None:
            self.exact = default_processor(attn)
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, *args)
        found = self._pass(attn, hidden_states, encoder_hidden_states) if attention_mask is None else None
        size, settings = None, None
        if found is not None:
            size = found.size
            settings = self.config.settings(size[0] * size[1], found.timestep)
        if settings is None:
            return _call(self.exact, given, named)
        text = hidden_states.shape[1] - size[0] * size[1] if hidden_states.ndim == 3 else 0  # of a single-stream block
        text += 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        with RerouteAttention(partial(self._attend, attn, size, text, settings)):
            if isinstance(self.exact, _EQUIVALENT):
                return _call(AttnProcessor2_0(), given, named)
            if not isinstance(self.exact, _DISPATCHING):
                return _call(self.exact, given, named)
            chosen, self.exact._attention_backend = self.exact._attention_backend, AttentionBackendName.NATIVE
            try:
                return _call(self.exact, given, named)
            finally:
                self.exact._attention_backend = chosen

    def _pass(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Pass | None:
        """What is known of the map in ``hidden_states`` if it attends to itself, or None."""
        if adds_keys(attn):
            return None
        if getattr(self.exact, "_parallel_config", None) is not None:  # other processes hold parts of the map
            return None
        joint = is_joint(attn)
        if encoder_hidden_states is not None and not joint:
            return None
        if hidden_states.ndim == 4:
            timestep = None if self.timestep is None else self.timestep.value
            return Pass((hidden_states.shape[-2], hidden_states.shape[-1]), timestep=timestep)
        if self.map_size is None:
            return None
        with_text = isinstance(attn, FluxAttention) and not joint  # a single-stream block
        return self.map_size.for_tokens(self, hidden_states.shape[1], with_text)

    def _attend(
        self,
        attn: nn.Module,
        size: tuple[int, int],
        text: int,
        settings: dict[str, Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In place of ``scaled_dot_product_attention``."""
        if attn_mask is not None or dropout_p or is_causal or enable_gqa:
            raise ValueError(
                f"attn: expected {type(self.exact).__name__} to call plain scaled_dot_product_attention, got attn_mask, "
                "dropout_p, is_causal or enable_gqa"
            )
        if not key.shape[2] == query.shape[2] == size[0] * size[1] + text:  # an IP-Adapter's own attention
            return scaled_dot_product_attention(query, key, value, scale=scale)
        q, k, v = autocast_like(query, key, value)
        behind = text and isinstance(attn, Attention)  # SD3 has its text behind the image, Flux before it
        if behind:
            q, k, v = (x.roll(text, 2) for x in (q, k, v))
        call = {
            "grid_size": size,
            "num_prefix_tokens": text,
            "features": k[:, :, text:].transpose(1, 2).flatten(2) if self.routing.router == "learned" else None,
            "scale": attn.scale if isinstance(self.exact, _EQUIVALENT) else scale,
        }
        attend = self.routing if self.teacher is None else partial(self.teacher, self)
        out = attend(q, k, v, **call, **settings)
        return out.roll(-text, 2) if behind else out

    # FluxAttention keeps these on its processor
    @property
    def _attention_backend(self):
        return self.exact._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend) -> None:
        self.exact._attention_backend = backend

    @property
    def _parallel_config(self):
        return self.exact._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config) -> None:
        self.exact._parallel_config = config


class _WithIPAdapter:
    """diffusers tells processors with an IP-Adapter by their class, and sets ``scale`` on them."""

    @property
    def scale(self):
        return self.exact.scale

    @scale.setter
    def scale(self, scale) -> None:
        self.exact.scale = scale


class _RoutedFluxIPAdapter(_WithIPAdapter, RoutedAttnProcessor, FluxIPAdapterAttnProcessor):
    pass


class _RoutedSD3IPAdapter(_WithIPAdapter, RoutedAttnProcessor, SD3IPAdapterJointAttnProcessor2_0):
    pass


_KINDS = {FluxIPAdapterAttnProcessor: _RoutedFluxIPAdapter, SD3IPAdapterJointAttnProcessor2_0: _RoutedSD3IPAdapter}


def routed_in_place_of(exact: Any, config: RoutedAttentionConfig, **where) -> RoutedAttnProcessor:
    """A routed processor that diffusers takes for what it replaces."""
    return _KINDS.get(type(exact), RoutedAttnProcessor)(config, exact=exact, **where)


def default_processor(attn: nn.Module) -> Any:
    """The processor that diffusers gives a layer."""
    if isinstance(attn, FluxAttention):
        return FluxAttnProcessor()
    fused = getattr(attn, "fused_projections", False)
    if is_joint(attn):
        return FusedJointAttnProcessor2_0() if fused else JointAttnProcessor2_0()
    if adds_keys(attn):
        return AttnAddedKVProcessor2_0()
    return FusedAttnProcessor2_0() if fused else AttnProcessor2_0()


def _call(processor: Any, given: tuple, named: dict[str, Any]):
    """Keyword arguments that a processor does not know are dropped, as diffusers does."""
    known = inspect.signature(processor.__call__).parameters
    return processor(*given, **{name: value for name, value in named.items() if name in known})
