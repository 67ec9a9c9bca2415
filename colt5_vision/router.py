"""The router: logits for every token, top-k on the logits, gates that carry the gradient."""

import math

import torch
from torch import Tensor, nn

from ._fx import fx_leaf
from ._torch_internals import in_onnx_export
from .checks import (
    TokenCount,
    check_filled,
    check_float_tensor,
    check_int,
    check_mask,
    check_pair,
    check_positive,
    check_router,
    filled_slots,
    token_count,
)
from .gates import (
    cut_into_cells,
    gate_budget,
    join_cells,
    log_gates,
    only_gradient,
    pass_straight,
)
from .init import init_weights
from .mean_query import route_by_mean_query
from .ops import coordinate_descent, route_topk, router_logits, soft_topk
from .ops.autocast import without_autocast
from .ops.dtypes import double_dtype, wide_dtype
from .positions import fixed_scores
from .routing import Routing

KINDS = ("learned", "mean_query", "random", "grid")
"""The kinds of routing that a layer may have, see :data:`~colt5_vision.checks.ROUTERS`."""

_CONTENT_FREE = ("random", "grid")
_TINY = 1e-6  # the least norm that tokens are divided by


class CoordinateDescentRouter(nn.Module):
    """Choose ``num_tokens`` of N tokens, differentiably.

        x (B, N, C) ─ logits (B, R, N) ─┬─ top-k ─ indices (B, R, K)
                                        └─ soft top-k ─ straight through ─ gates (B, R, K)

    The selection is a top-k on the logits. What makes it trainable are the gates: a soft top-k of
    the logits, by default passed straight through. They are then 1 in forward, and have the soft
    gates' gradient in backward. Without gradients the soft gates are never computed.

    Learned logits are ``x / |x| · w`` with ``w ~ N(0, 1)``: unit scale at initialisation whatever
    the width of ``x``.

    Args:
        dim: width C of the tokens.
        straight_through: gates of exactly 1 with the gradient of the soft gates. False: the soft
            gates themselves; those of ``"random"`` and ``"grid"`` are always 1.
        n_iters: None for exact gates (:func:`~colt5_vision.ops.soft_topk`), or the number of
            coordinate-descent iterations.
        fetch_k_ratio: the gates sum to this times the number of routed tokens (CoLT5: 9/8), so that
            runners-up get a gradient.
        eps: temperature in units of the logits.
        eps_decay, eps_init: eps scaling for ``n_iters``, see
            :func:`~colt5_vision.ops.coordinate_descent`.
        num_routing_tokens: R, how many sets of tokens are chosen side by side.
        learned_routing_tokens: False: no parameter, ``routing_tokens`` are given with every call.
        log_gradient: straight-through gates have the gradient of the logarithm of the soft gates.
            Soft gates of few among many tokens are small, and so is their own gradient.
        cosine_sim_routing: compare by cosine times ``cosine_sim_scale`` (default sqrt(dim)).
        normalize: False: learned logits are ``x · w``, not divided by the norm of the token.
        cell_size: stratify: each cell of this many tokens (an int or (height, width)) gets its
            share of the slots.
        router: ``"learned"``; or without parameters: ``"mean_query"`` (keys that the mean query
            attends to), ``"random"`` (a fixed pseudo-random choice, or fresh from a generator),
            ``"grid"`` (evenly spread).
        device, dtype: of the parameters.

    Attributes:
        kind: the ``router`` given.
        routing_token: (R, C), or None.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: CoLT5 (arXiv 2303.09752) section 3; CODA (arXiv 2304.04947) for eps scaling.
    """

    def __init__(
        self,
        dim: int,
        straight_through: bool = True,
        n_iters: int | None = None,
        fetch_k_ratio: float = 9 / 8,
        eps: float = 1.0,
        eps_decay: float = 1.0,
        eps_init: float | None = None,
        num_routing_tokens: int = 1,
        learned_routing_tokens: bool = True,
        *,
        log_gradient: bool = False,
        cosine_sim_routing: bool = False,
        cosine_sim_scale: float | None = None,
        normalize: bool = True,
        cell_size: int | tuple[int, int] | None = None,
        router: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()

        # what is routed
        self.kind = check_router(router, KINDS)
        self.dim = check_int("dim", dim)
        self.num_routing_tokens = check_int("num_routing_tokens", num_routing_tokens)
        self.cell_size = None if cell_size is None else check_pair("cell_size", cell_size)

        # the gates
        self._check_gates(straight_through, log_gradient, n_iters, eps_init, eps_decay)
        self.straight_through, self.log_gradient = straight_through, log_gradient
        self.n_iters = None if n_iters is None else check_int("n_iters", n_iters)
        self.eps = check_positive("eps", eps)
        self.eps_init = None if eps_init is None else check_positive("eps_init", eps_init)
        self.eps_decay = check_positive("eps_decay", eps_decay)
        if self.eps_decay > 1:
            raise ValueError(f"eps_decay: expected a number in (0, 1], got {eps_decay}")
        self.fetch_k_ratio = check_positive("fetch_k_ratio", fetch_k_ratio)
        if fetch_k_ratio < 1:
            raise ValueError(f"fetch_k_ratio: expected a number >= 1, got {fetch_k_ratio}")

        # what tokens are compared with
        self._check_comparison(
            learned_routing_tokens, cosine_sim_routing, cosine_sim_scale, normalize
        )
        self.normalize, self.cosine_sim_scale = normalize, None
        if cosine_sim_routing:
            scale = math.sqrt(dim) if cosine_sim_scale is None else cosine_sim_scale
            self.cosine_sim_scale = check_positive("cosine_sim_scale", scale)

        # the routing tokens, unless they come with a call
        self.routing_token = None
        if self.kind == "learned" and learned_routing_tokens:
            token = torch.empty(num_routing_tokens, dim, device=device, dtype=dtype)
            self.routing_token = nn.Parameter(token)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the routing tokens from N(0, 1)."""
        if self.routing_token is not None:
            nn.init.normal_(self.routing_token)

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did."""
        init_weights(self)

    def _check_gates(self, straight_through, log_gradient, n_iters, eps_init, eps_decay) -> None:
        if not isinstance(straight_through, bool):
            raise TypeError(
                "straight_through, router_straight_through: expected True or False, "
                f"got {straight_through!r}"
            )
        if log_gradient and not straight_through:
            raise ValueError(
                "log_gradient: only used with straight_through=True "
                "(of a module: router_straight_through)"
            )
        if n_iters is None and (eps_init is not None or eps_decay != 1.0):
            raise ValueError("eps_init, eps_decay: a schedule needs n_iters; exact gates have none")

    def _check_comparison(self, learned_tokens, cosine, cosine_scale, normalize) -> None:
        if self.kind != "learned" and (cosine or not learned_tokens or not normalize):
            raise ValueError(
                "cosine_sim_routing, learned_routing_tokens, normalize: only used by "
                f"router='learned', got {self.kind!r}"
            )
        if cosine_scale is not None and not cosine:
            raise ValueError("cosine_sim_scale: only used with cosine_sim_routing=True")
        if cosine and not normalize:
            raise ValueError(
                "normalize: a cosine divides by the norms, expected True with "
                "cosine_sim_routing=True"
            )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, router={self.kind!r}, num_routing_tokens={self.num_routing_tokens}, "
            f"eps={self.eps}, n_iters={self.n_iters}, normalize={self.normalize}, "
            f"straight_through={self.straight_through}"
        )

    def _check_tokens(
        self, x: Tensor, mask: Tensor | None, grid_size: tuple[int, int] | None
    ) -> None:
        check_float_tensor("x", x, ndim=3)
        batch, num_tokens, dim = x.shape
        if dim != self.dim:
            raise ValueError(f"x: expected (B, N, {self.dim}), got {tuple(x.shape)}")
        if num_tokens < 1:
            raise ValueError(f"x: expected at least one token, got shape {tuple(x.shape)}")
        check_mask("mask", mask, (batch, num_tokens))
        if grid_size is not None:
            height, width = check_pair("grid_size", grid_size)
            if height * width != num_tokens:
                raise ValueError(
                    f"grid_size: expected H * W = {num_tokens}, got {height} * {width}"
                )

    def _check_compared(self, routing_tokens, query, key, generator) -> None:
        if (query is not None or key is not None) and self.kind != "mean_query":
            raise ValueError(
                f"query, key: only used by router='mean_query', this one is {self.kind!r}"
            )
        own_tokens = self.kind != "learned" or self.routing_token is not None
        if routing_tokens is not None and own_tokens:
            raise ValueError(
                "routing_tokens: only used by router='learned' with learned_routing_tokens=False"
            )
        if generator is not None and self.kind != "random":
            raise ValueError(f"generator: only used by router='random', this one is {self.kind!r}")

    def logits(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        routing_tokens: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Routing logits (B, R, N); arguments as in :meth:`forward`.

        float32; those of ``"learned"`` and ``"mean_query"`` float64 for float64 tokens.
        """
        self._check_tokens(x, mask, grid_size)
        self._check_compared(routing_tokens, query, key, generator)
        batch, num_tokens, _ = x.shape
        routes = self.num_routing_tokens

        if generator is not None:
            shape = (batch, routes, num_tokens)
            noise = torch.rand(shape, generator=generator, device=generator.device)
            return noise.to(x.device)
        if self.kind in _CONTENT_FREE:
            grid_size = (1, num_tokens) if grid_size is None else check_pair("grid_size", grid_size)
            scores = fixed_scores(self.kind, *grid_size, range(routes), x.device)
            return scores.expand(batch, -1, -1)
        with without_autocast(x.device.type):
            if self.kind == "mean_query":
                return route_by_mean_query(x, query, key, routes, mask=mask)
            return self._learned_logits(x, routing_tokens)

    def _learned_logits(self, x: Tensor, routing_tokens: Tensor | None) -> Tensor:
        tokens = self.routing_token
        if tokens is None:
            tokens = self._given_tokens(x, routing_tokens)
        tokens = tokens.to(wide_dtype(x))
        if self.cosine_sim_scale is not None:
            unit = nn.functional.normalize(tokens, dim=-1, eps=_TINY)
            tokens = self.cosine_sim_scale * unit
        if self.normalize:
            return router_logits(x, tokens, eps=_TINY)
        return (x.to(tokens.dtype) @ tokens.mT).mT

    def _given_tokens(self, x: Tensor, routing_tokens: Tensor | None) -> Tensor:
        """``routing_tokens`` of a call as (B, R, C)."""
        if routing_tokens is None:
            raise ValueError("routing_tokens: needed, the router has learned_routing_tokens=False")
        check_float_tensor("routing_tokens", routing_tokens)
        tokens = routing_tokens.unsqueeze(1) if routing_tokens.ndim == 2 else routing_tokens
        expected = (x.shape[0], self.num_routing_tokens, self.dim)
        if tuple(tokens.shape) != expected:
            raise ValueError(
                f"routing_tokens: expected shape {expected}, got {tuple(routing_tokens.shape)}"
            )
        return tokens

    def wants_soft_gates(self, logits: Tensor) -> bool:
        """Whether anyone will see the soft gates of ``logits``."""
        # straight through they are for a gradient only, and an ONNX file is for inference
        trains = torch.is_grad_enabled() and logits.requires_grad
        trains = trains and not in_onnx_export(logits)
        return self.kind not in _CONTENT_FREE and (trains or not self.straight_through)

    def relax(
        self, logits: Tensor, k: float | Tensor, max_k: float, *, mask: Tensor | None
    ) -> Tensor:
        """The relaxation of top-k: gates (..., N) of logits (..., N), with sum ``k``.

        Args:
            k: a number, or one of each row (...).
            max_k: a number that no entry of ``k`` exceeds, so that tensors are not sorted whole.
            mask: (..., N), True = valid.
        """
        if self.n_iters is None:
            bound = max_k if isinstance(k, Tensor) else None
            return soft_topk(logits, k, eps=self.eps, mask=mask, max_k=bound)
        return coordinate_descent(
            logits,
            k,
            n_iters=self.n_iters,
            eps=self.eps,
            eps_init=self.eps_init,
            eps_decay=self.eps_decay,
            mask=mask,
        )

    def soft_gates(
        self,
        logits: Tensor,
        slots: int,
        *,
        filled: Tensor | None = None,
        mask: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Soft gates (..., N) of logits (..., N): their sum is ``fetch_k_ratio`` times the number
        of routed tokens.

        Args:
            slots: routed tokens of a row.
            filled: (...), how many of them a row fills; None: all.
            mask: (..., N), True = valid.
            grid_size: (H, W), for ``cell_size``: each cell has its share of the sum.
        """
        budget = bound = gate_budget(slots, self.fetch_k_ratio, logits.shape[-1])
        if filled is not None:  # as precise as a number is
            budget = filled.to(double_dtype(logits.device)) * self.fetch_k_ratio
            budget = budget.clamp_max(bound)
        if self.cell_size is None:
            return self.relax(logits, budget, bound, mask=mask)
        cells = (grid_size, self.cell_size)
        rows, shares, valid = cut_into_cells(logits, budget, bound, *cells, mask)
        return join_cells(self.relax(rows, shares, bound, mask=valid), *cells)

    def straight(self, gates: Tensor) -> Tensor:
        """Soft gates, of any shape, as the forward pass uses them."""
        return pass_straight(gates, self.log_gradient) if self.straight_through else gates

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        num_tokens: TokenCount,
        counts: Tensor | None = None,
        mask: Tensor | None = None,
        routing_tokens: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
        logits: Tensor | None = None,
    ) -> Routing:
        """Choose tokens.

        Args:
            x: (B, N, C) tokens, a map in raster order.
            num_tokens: how many, an int >= 1 (above N: all of them) or a float in (0, 1], that
                share of N.
            counts: (B,), how many of these slots each sample fills: integers >= 1, or floats in
                (0, 1], that share of its valid tokens (rounded, at least one). What exceeds the
                slots is cut.
            mask: (B, N) bool, True = valid. Masked tokens are never routed while a valid one is
                left.
            routing_tokens: (B, R, C) (or (B, C) for R = 1), in place of learned ones; entries of
                unit scale.
            grid_size: (H, W) of the map; needed by ``cell_size``, used by ``router="grid"``.
            query, key: (B, heads, N, head_dim), what ``router="mean_query"`` compares (default: the
                tokens themselves).
            generator: draws ``router="random"`` anew; default: the same choice for the same shape.
            logits: (B, R, N), in place of :meth:`logits` of the arguments above.

        Returns:
            :class:`Routing` of (B, R, K).

        Raises:
            TypeError, ValueError: for bad arguments.
        """
        compared = {
            "routing_tokens": routing_tokens,
            "query": query,
            "key": key,
            "generator": generator,
        }
        if logits is None:
            logits = self.logits(x, mask=mask, grid_size=grid_size, **compared)
        else:
            self._check_tokens(x, mask, grid_size)
            self._check_logits(logits, x, compared)
        if self.cell_size is not None and grid_size is None:
            raise ValueError("grid_size: needed, the router has a cell_size")
        batch, n, _ = x.shape

        # how many
        slots = token_count("num_tokens", num_tokens, n)
        filled = None
        if counts is not None:
            counts = check_filled("counts", counts, batch).to(x.device)
            filled = filled_slots(counts, slots, n, mask)
            filled = filled.unsqueeze(-1).expand(-1, self.num_routing_tokens)  # (B, R)
        mask = None if mask is None else mask.unsqueeze(1).expand_as(logits)  # (B, R, N)

        # which: the top of the logits
        indices, valid = self._select(logits, slots, filled, mask, grid_size)  # (B, R, K)

        # what carries their gradient
        if self.wants_soft_gates(logits):
            soft = self._gates(logits, slots, filled, mask, grid_size).gather(-1, indices)
            gates, log_weights = self.straight(soft), log_gates(soft)
            if self.straight_through:
                log_weights = only_gradient(log_weights)
        else:
            gates = torch.ones_like(indices, dtype=logits.dtype)
            log_weights = torch.zeros_like(gates)
        log_weights = torch.where(valid, log_weights, float("-inf"))
        return Routing(indices, torch.where(valid, gates, 0), log_weights, valid)

    def _check_logits(self, logits: Tensor, x: Tensor, compared: dict) -> None:
        check_float_tensor("logits", logits)
        expected = (x.shape[0], self.num_routing_tokens, x.shape[1])
        if tuple(logits.shape) != expected:
            raise ValueError(f"logits: expected shape {expected}, got {tuple(logits.shape)}")
        for name, value in compared.items():
            if value is not None:
                raise ValueError(f"{name}: only used to compute logits, which are given")

    def _select(
        self, logits: Tensor, slots: int, filled: Tensor | None, mask: Tensor | None, grid_size
    ) -> tuple[Tensor, Tensor]:
        """Indices and validity (B, R, K) of the top logits, of each cell or of all."""
        how = {} if filled is None else {"num_slots": slots}
        if self.cell_size is not None:
            how |= {"grid_size": grid_size, "cell_size": self.cell_size}
        return route_topk(logits, slots if filled is None else filled, mask=mask, **how)

    def _gates(
        self, logits: Tensor, slots: int, filled: Tensor | None, mask: Tensor | None, grid_size
    ) -> Tensor:
        """Soft gates (B, R, N) of this choice; where all tokens are taken, 1."""
        taken_whole = slots == logits.shape[-1] and filled is None
        if taken_whole and self.n_iters is not None:
            # what iterations only approach, and exact gates give
            return soft_topk(logits, float(slots), eps=self.eps, mask=mask)
        return self.soft_gates(logits, slots, filled=filled, mask=mask, grid_size=grid_size)
