"""Routed feed-forward: a light one for every token, a heavy one for the routed."""

import torch
from torch import Tensor, nn

from ._fx import fx_leaf
from .checks import (
    TokenCount,
    check_count,
    check_float_tensor,
    check_int,
    check_mask,
    check_positive,
    check_router_kwargs,
    check_token_count,
    hint_at_converter,
)
from .init import init_weights
from .ops import join
from .router import CoordinateDescentRouter
from .routing import gather_tokens


def feed_forward(dim: int, mult: float, device=None, dtype=None) -> nn.Sequential:
    """Pre-normalised two-layer perceptron with a hidden width of ``mult * dim``."""
    hidden = max(1, int(dim * mult))
    factory = {"device": device, "dtype": dtype}
    return nn.Sequential(
        nn.RMSNorm(dim, eps=1e-6, **factory),
        nn.Linear(dim, hidden, **factory),
        nn.GELU(),
        nn.Linear(hidden, dim, **factory),
    )


class ConditionalRoutedFeedForward(nn.Module):
    """``light(x) + scatter(gate · heavy(x_routed))``, normalisation included, residual not.

        x ─┬─ light_ff, every token ─────────────────┐
           └─ router ─ routed tokens ─ heavy_ff ─────┴─ join ─ out

    Args:
        dim: width C.
        num_heavy_tokens: tokens that get the heavy branch, an int >= 1 or a share in (0, 1].
        light_ff_mult, heavy_ff_mult: hidden width over ``dim``.
        router_straight_through: gates of exactly 1 in forward; False: the soft gates themselves.
            None: True.
        router: kind of router, see :class:`CoordinateDescentRouter`.
        router_kwargs: further arguments of the router.
        channel_first: maps come as (B, C, H, W); False: (B, H, W, C).
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: CoLT5 (arXiv 2303.09752) section 3.1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens: TokenCount,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool | None = None,
        router: str = "learned",
        router_kwargs: dict | None = None,
        channel_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.register_load_state_dict_pre_hook(hint_at_converter)
        factory = {"device": device, "dtype": dtype}
        self.dim = check_int("dim", dim)
        self.num_heavy_tokens = check_token_count("num_heavy_tokens", num_heavy_tokens)
        self.channel_first = channel_first

        straight = True if router_straight_through is None else router_straight_through
        options = check_router_kwargs(router_kwargs, "the feed-forward has one route")
        self.router = CoordinateDescentRouter(dim, straight, router=router, **options, **factory)
        self.light_ff = feed_forward(dim, check_positive("light_ff_mult", light_ff_mult), **factory)
        self.heavy_ff = feed_forward(dim, check_positive("heavy_ff_mult", heavy_ff_mult), **factory)

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did."""
        init_weights(self)

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        num_heavy_tokens: TokenCount | Tensor | None = None,
    ) -> Tensor:
        """Map x to the same shape.

        Args:
            x: tokens (B, N, C), or a map (B, C, H, W) (``channel_first``) or (B, H, W, C).
            mask: (B, N) or (B, H, W) bool, True = valid. Masked tokens are not read, not routed,
                and come out as 0.
            num_heavy_tokens: overrides the module's. A tensor (B,) is a count of each sample:
                integers, or floats, that share of its valid tokens; at most the module's own count.

        Raises:
            TypeError, ValueError: for bad arguments.
        """
        check_float_tensor("x", x)
        if x.ndim not in (3, 4):
            raise ValueError(
                f"x: expected (B, N, C) or a map of 4 dimensions, got shape {tuple(x.shape)}"
            )
        channel_first = self.channel_first and x.ndim == 4
        x = x.permute(0, 2, 3, 1) if channel_first else x
        if x.shape[-1] != self.dim:
            raise ValueError(f"x: expected {self.dim} channels, got {x.shape[-1]}")
        check_mask("mask", mask, x.shape[:-1])
        count = check_count("num_heavy_tokens", num_heavy_tokens, self.num_heavy_tokens, x.shape[0])

        if x.ndim == 3:
            return self._tokens(x, mask, count, (1, x.shape[1]))
        grid_size = tuple(x.shape[1:3])
        mask = None if mask is None else mask.flatten(1)
        out = self._tokens(x.flatten(1, 2), mask, count, grid_size).unflatten(1, grid_size)
        return out.permute(0, 3, 1, 2) if channel_first else out

    def _tokens(self, x: Tensor, mask: Tensor | None, count, grid_size) -> Tensor:
        """x (B, N, C), mask (B, N) -> (B, N, C)."""
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0)
        place = {"mask": mask, "grid_size": grid_size}
        routing = self.router(x, num_tokens=count.slots, counts=count.filled, **place).only_route()
        heavy = self.heavy_ff(gather_tokens(x, routing.indices))
        out = join(self.light_ff(x), heavy, routing)
        return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0)
