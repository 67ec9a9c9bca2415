"""The layers with the arguments of colt5_attention, in the file that has its name there.

Each is its namesake in the core, whose arguments it takes, too. ``router_kwargs`` may have those of
:class:`~colt5_vision.compat.CoordinateDescentRouter`. Switches may be None or True: kernels are
used wherever they can run, and attention is always fused.
"""

from torch import Tensor

from .. import attention, block, cross_attention, feedforward, sequence
from .._fx import fx_leaf
from ..causal import attention as causal
from ..causal.cache import AutoregressiveCache
from ..checks import TokenCount, check_int
from .router import CoordinateDescentRouter, adopt_routers, core_options
from .switches import check_switches

__all__ = [
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "CoordinateDescentRouter",
]


class ConditionalRoutedFeedForward(feedforward.ConditionalRoutedFeedForward):
    """:class:`colt5_vision.ConditionalRoutedFeedForward` with colt5_attention's arguments.

    Args:
        dim: width C.
        use_triton: None or True.
        router_kwargs: of :class:`~colt5_vision.compat.CoordinateDescentRouter`.
        **options: of the core's feed-forward.

    Raises:
        TypeError, ValueError: for bad arguments.
    """

    def __init__(
        self,
        dim: int,
        *,
        use_triton: bool | None = None,
        router_kwargs: dict | None = None,
        **options,
    ):
        check_switches(use_triton=use_triton)
        super().__init__(dim, router_kwargs=core_options(router_kwargs), **options)
        adopt_routers(self, router_kwargs)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_tokens: TokenCount | Tensor | None = None,
    ) -> Tensor:
        """As the core's; all arguments may be positional."""
        return super().forward(x, mask=mask, num_heavy_tokens=num_heavy_tokens)


class ConditionalRoutedAttention(sequence.ConditionalRoutedAttention):
    """:class:`colt5_vision.ConditionalRoutedAttention` with colt5_attention's arguments.

    Args:
        dim: width C.
        use_triton, use_flash_attn: None or True.
        router_kwargs: of :class:`~colt5_vision.compat.CoordinateDescentRouter`.
        **options: of the core's attention.

    Raises:
        TypeError, ValueError: for bad arguments.
    """

    def __init__(
        self,
        dim: int,
        *,
        use_triton: bool | None = None,
        use_flash_attn: bool | None = None,
        router_kwargs: dict | None = None,
        **options,
    ):
        check_switches(use_triton=use_triton, use_flash_attn=use_flash_attn)
        super().__init__(dim, router_kwargs=core_options(router_kwargs), **options)
        adopt_routers(self, router_kwargs)


class ConditionalRoutedImageAttention(attention.ConditionalRoutedImageAttention):
    """:class:`colt5_vision.ConditionalRoutedImageAttention` with colt5_attention's arguments.

    Args:
        dim: channels C.
        use_triton, use_flash_attn: None or True.
        router_kwargs: of :class:`~colt5_vision.compat.CoordinateDescentRouter`.
        **options: of the core's attention.

    Raises:
        TypeError, ValueError: for bad arguments.
    """

    def __init__(
        self,
        dim: int,
        *,
        use_triton: bool | None = None,
        use_flash_attn: bool | None = None,
        router_kwargs: dict | None = None,
        **options,
    ):
        check_switches(use_triton=use_triton, use_flash_attn=use_flash_attn)
        super().__init__(dim, router_kwargs=core_options(router_kwargs), **options)
        adopt_routers(self, router_kwargs)


class ConditionalRoutedAutoregressiveAttention(causal.ConditionalRoutedAutoregressiveAttention):
    """:class:`colt5_vision.ConditionalRoutedAutoregressiveAttention` with colt5_attention's
    arguments.

    Args:
        dim: width C.
        use_triton, use_flash_attn: None or True.
        router_kwargs: of :class:`~colt5_vision.compat.CoordinateDescentRouter`, without
            ``route_block_size`` and ``method``.
        **options: of the core's attention.

    Raises:
        TypeError, ValueError: for bad arguments.
    """

    def __init__(
        self,
        dim: int,
        *,
        use_triton: bool | None = None,
        use_flash_attn: bool | None = None,
        router_kwargs: dict | None = None,
        **options,
    ):
        check_switches(use_triton=use_triton, use_flash_attn=use_flash_attn)
        harmless = {"route_block_size": None, "method": "coordinate_descent"}
        for name, value in harmless.items():
            if (router_kwargs or {}).get(name, value) != value:
                raise ValueError(
                    f"router_kwargs[{name!r}]: needs the whole sequence, which a causal router "
                    "cannot know"
                )
        super().__init__(dim, router_kwargs=core_options(router_kwargs), **options)

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        num_heavy_tokens_q: TokenCount | Tensor | None = None,
        num_heavy_tokens_kv: int | Tensor | None = None,
        random_route: bool | None = None,
        cache: AutoregressiveCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, AutoregressiveCache]:
        """As the core's. ``random_route`` may be None or False."""
        check_switches(random_route=random_route)
        return super().forward(
            x,
            mask=mask,
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            cache=cache,
            return_cache=return_cache,
        )


class ConditionalRoutedCrossAttention(cross_attention.ConditionalRoutedCrossAttention):
    """:class:`colt5_vision.ConditionalRoutedCrossAttention` with colt5_attention's arguments.

    Args:
        dim: width C of both.
        route_block_size: each stretch of this many tokens of the context gets its share of keys.
        num_sets_kv: None or 1; sets of keys are ``kv_routing_tokens``.
        use_triton, use_flash_attn: None or True.
        router_kwargs, kv_router_kwargs: of :class:`~colt5_vision.compat.CoordinateDescentRouter`.
        **options: of the core's attention.

    Raises:
        TypeError, ValueError: for bad arguments.
    """

    def __init__(
        self,
        dim: int,
        *,
        route_block_size: int | None = None,
        num_sets_kv: int | None = None,
        use_triton: bool | None = None,
        use_flash_attn: bool | None = None,
        router_kwargs: dict | None = None,
        kv_router_kwargs: dict | None = None,
        **options,
    ):
        switches = {"use_triton": use_triton, "use_flash_attn": use_flash_attn}
        check_switches(**switches, num_sets_kv=num_sets_kv)
        of_both, of_keys = core_options(router_kwargs), core_options(kv_router_kwargs)
        if route_block_size is not None:
            if {**of_both, **of_keys}.get("cell_size") is not None:
                raise ValueError(
                    "route_block_size: router_kwargs or kv_router_kwargs has cells already, "
                    "expected one of the two"
                )
            of_keys["cell_size"] = (1, check_int("route_block_size", route_block_size))

        super().__init__(dim, router_kwargs=of_both, kv_router_kwargs=of_keys, **options)
        adopt_routers(self, router_kwargs)
        adopt_routers(self.kv_router, {**(router_kwargs or {}), **(kv_router_kwargs or {})})


class ConditionalRoutedTransformerBlock(block.ConditionalRoutedTransformerBlock):
    """:class:`colt5_vision.ConditionalRoutedTransformerBlock` with colt5_attention's arguments.

    Args:
        dim: channels C.
        use_triton, use_flash_attn: None or True.
        router_kwargs: of :class:`~colt5_vision.compat.CoordinateDescentRouter`.
        **options: of the core's block and of its attention.

    Raises:
        TypeError, ValueError: for bad arguments.
    """

    def __init__(
        self,
        dim: int,
        *,
        use_triton: bool | None = None,
        use_flash_attn: bool | None = None,
        router_kwargs: dict | None = None,
        **options,
    ):
        check_switches(use_triton=use_triton, use_flash_attn=use_flash_attn)
        super().__init__(dim, router_kwargs=core_options(router_kwargs), **options)
        adopt_routers(self, router_kwargs)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_attn_tokens_q: TokenCount | Tensor | None = None,
        num_heavy_attn_tokens_kv: TokenCount | Tensor | None = None,
        num_heavy_ff_tokens: TokenCount | Tensor | None = None,
    ) -> Tensor:
        """As the core's; all arguments may be positional."""
        return super().forward(
            x,
            mask=mask,
            num_heavy_attn_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_attn_tokens_kv=num_heavy_attn_tokens_kv,
            num_heavy_ff_tokens=num_heavy_ff_tokens,
        )
