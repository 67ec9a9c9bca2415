"""The router: logits for every token, top-k on the logits, gates that carry the gradient."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import (
    TokenCount,
    check_float_tensor,
    check_int,
    check_mask,
    check_pair,
    check_positive,
    filled_slots,
    token_count,
)
from .gates import METHODS, soft_gates
from .mean_query import route_by_mean_query
from .ops import route_topk, router_logits
from .ops.autocast import without_autocast
from .positions import dispersed_rank, hashed_uniform
from .predecessor import check_predecessor_options

ROUTERS = ("learned", "mean_query", "random", "grid")

_TINY = 1e-6  # the least norm that tokens are divided by


class Routing(NamedTuple):
    """Which tokens were routed; every field is (B, R, K): samples, routes, slots.

    Attributes:
        indices: int64 raster index of the token in each slot, in falling order of its logit. In range even where empty.
        gates: weight of the token in [0, 1]; with straight-through exactly 1. 0 in empty slots.
        log_weights: log of the gate, to be added to the logit of the token as a key; -inf in empty slots.
        mask: bool, False where a slot is empty (fewer valid tokens than slots).
    """

    indices: Tensor
    gates: Tensor
    log_weights: Tensor
    mask: Tensor


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens (B, N, C) at ``indices`` (B, ...) -> (B, ..., C)."""
    flat = indices.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.gather(1, flat).unflatten(1, indices.shape[1:])


def router_options(options: dict | None, num_routing_tokens: str, **defaults) -> dict:
    """``router_kwargs`` of a module, free of what the module sets itself; a text says what to do about the routes."""
    options = {**defaults, **(options or {})}
    reserved = {
        "num_routing_tokens": num_routing_tokens,
        "straight_through": "give router_straight_through instead",
        "router": "give router instead",
        "learned_routing_tokens": "the module has no routing tokens to pass",
        "device": "give device instead",
        "dtype": "give dtype instead",
    }
    for name, instead in reserved.items():
        if name in options:
            raise ValueError(f"router_kwargs[{name!r}]: {instead}")
    return options


def _compare(x: Tensor, directions: Tensor, normalize: bool) -> Tensor:
    """Learned logits (B, R, N) of tokens (B, N, C) and directions (R, C) or (B, R, C), in the dtype of the latter."""
    if normalize:
        return router_logits(x, directions, eps=_TINY)
    return (x.to(directions.dtype) @ directions.mT).mT


def _log(gates: Tensor) -> Tensor:
    return gates.clamp_min(torch.finfo(gates.dtype).tiny).log()


class CoordinateDescentRouter(nn.Module):
    """Choose ``num_tokens`` of N tokens, differentiably.

    The selection is a top-k on the logits. What makes it trainable are the gates: a soft top-k of the logits, by
    default passed straight through (1 in forward, the soft gates' gradient in backward; without gradients it is never
    computed). Attentions of CoLT5's sum in which every token queries use the soft gates themselves.

    Args:
        dim: width C of the tokens.
        straight_through: gates of exactly 1 with the gradient of the soft gates; False: the soft gates themselves (those
            of ``"random"`` and ``"grid"`` are always 1).
        log_gradient: straight-through gates have the gradient of the logarithm of the soft gates: what passes as 1
            changes by as much in proportion. Soft gates of few among many tokens are small, and so is their gradient.
        n_iters: None for exact gates (:func:`~colt5_vision.ops.soft_topk`), or the number of coordinate-descent
            iterations.
        fetch_k_ratio: the gates sum to this times the number of routed tokens (CoLT5: 9/8), so that runners-up get a
            gradient.
        eps: temperature in units of the logits.
        eps_decay, eps_init: eps scaling for ``n_iters``, see :func:`~colt5_vision.ops.coordinate_descent`.
        num_routing_tokens: R, how many sets of tokens are chosen side by side.
        learned_routing_tokens: False: no parameter, ``routing_tokens`` are given with every call.
        cosine_sim_routing: compare by cosine times ``cosine_sim_scale`` (default sqrt(dim)): logits are bounded.
        normalize: False: learned logits are ``x · w``, not divided by the norm of the token, as in colt5-attention.
        cell_size: stratify: each cell of this many tokens (an int or (height, width)) gets its share of the slots.
        route_block_size: the same for sequences: stretches of this many tokens, ``cell_size=(1, route_block_size)``.
        router: ``"learned"``; or without parameters, deterministic: ``"mean_query"`` (keys that the mean query attends
            to), ``"random"`` (a fixed pseudo-random choice, or fresh from a generator) and ``"grid"`` (evenly spread).
        use_triton, triton_checkpoint_segments: of the predecessor. The first: None or True, kernels are used wherever
            they can run; the second has no counterpart.
        device, dtype: of the parameters.

    Learned logits are ``x / |x| · w`` with ``w ~ N(0, 1)``: unit scale at initialisation whatever the width of ``x``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

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
        route_block_size: int | None = None,
        router: str = "learned",
        method: str = "coordinate_descent",
        use_triton: bool | None = None,
        triton_checkpoint_segments: None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_predecessor_options(use_triton=use_triton, triton_checkpoint_segments=triton_checkpoint_segments)
        if router not in ROUTERS:
            raise ValueError(f"router: expected one of {ROUTERS}, got {router!r}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
        if method != "coordinate_descent":
            if router in ("random", "grid"):
                raise ValueError(f"method: router={router!r} has gates of 1, got {method!r}")
            if eps_init is not None or eps_decay != 1.0:
                raise ValueError(f"eps_init, eps_decay: only used by method='coordinate_descent', got {method!r}")
            if n_iters is not None and method == "cumulative_softmax":
                raise ValueError("n_iters: method='cumulative_softmax' has no iterations to choose")
        if n_iters is None and (eps_init is not None or eps_decay != 1.0):
            raise ValueError("eps_init, eps_decay: a schedule needs n_iters; exact gates have none")
        if check_positive("fetch_k_ratio", fetch_k_ratio) < 1:
            raise ValueError(f"fetch_k_ratio: expected a number >= 1, got {fetch_k_ratio}")
        if cosine_sim_scale is not None and not cosine_sim_routing:
            raise ValueError("cosine_sim_scale: only used with cosine_sim_routing=True")
        if router != "learned" and (cosine_sim_routing or not learned_routing_tokens or not normalize):
            raise ValueError(
                f"cosine_sim_routing, learned_routing_tokens, normalize: only used by router='learned', got {router!r}"
            )
        if cosine_sim_routing and not normalize:
            raise ValueError("normalize: a cosine divides by the norms, expected True with cosine_sim_routing=True")
        self.route_block_size = route_block_size
        if route_block_size is not None:
            if cell_size is not None:
                raise ValueError("route_block_size: there is a cell_size already, expected one of the two")
            cell_size = (1, check_int("route_block_size", route_block_size))
        if not isinstance(straight_through, bool):
            raise TypeError(
                f"straight_through, router_straight_through: expected True or False, got {straight_through!r}"
            )
        if log_gradient and not straight_through:
            raise ValueError(
                "log_gradient: only used with straight_through=True (of a module: router_straight_through)"
            )
        self.dim = check_int("dim", dim)
        self.straight_through, self.log_gradient = straight_through, log_gradient
        self.n_iters = None if n_iters is None else check_int("n_iters", n_iters)
        self.fetch_k_ratio = fetch_k_ratio
        self.eps = check_positive("eps", eps)
        self.eps_decay = check_positive("eps_decay", eps_decay)
        if self.eps_decay > 1:
            raise ValueError(f"eps_decay: expected a number in (0, 1], got {eps_decay}")
        self.eps_init = None if eps_init is None else check_positive("eps_init", eps_init)
        self.num_routing_tokens = check_int("num_routing_tokens", num_routing_tokens)
        self.normalize, self.cosine_sim_scale = normalize, None
        if cosine_sim_routing:
            scale = math.sqrt(dim) if cosine_sim_scale is None else cosine_sim_scale
            self.cosine_sim_scale = check_positive("cosine_sim_scale", scale)
        self.cell_size = None if cell_size is None else check_pair("cell_size", cell_size)
        self.router, self.method = router, method
        learned = router == "learned" and learned_routing_tokens
        self.routing_token = None
        if learned:
            self.routing_token = nn.Parameter(torch.randn(num_routing_tokens, dim, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, router={self.router!r}, num_routing_tokens={self.num_routing_tokens}, eps={self.eps}, "
            f"n_iters={self.n_iters}, normalize={self.normalize}, straight_through={self.straight_through}"
        )

    def _check_tokens(self, x: Tensor, mask: Tensor | None, grid_size: tuple[int, int] | None) -> None:
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
                raise ValueError(f"grid_size: expected H * W = {num_tokens}, got {height} * {width}")

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
        batch, num_tokens, _ = x.shape
        if (query is not None or key is not None) and self.router != "mean_query":
            raise ValueError(f"query, key: only used by router='mean_query', this one is {self.router!r}")
        if routing_tokens is not None and (self.router != "learned" or self.routing_token is not None):
            raise ValueError("routing_tokens: only used by router='learned' with learned_routing_tokens=False")
        if generator is not None and self.router != "random":
            raise ValueError(f"generator: only used by router='random', this one is {self.router!r}")
        routes = self.num_routing_tokens
        if self.router == "random":
            if generator is not None:
                noise = torch.rand(batch, routes, num_tokens, generator=generator, device=generator.device)
                return noise.to(x.device)
            return hashed_uniform(routes * num_tokens, 0, x.device).view(1, routes, num_tokens).expand(batch, -1, -1)
        if self.router == "grid":
            height, width = (1, num_tokens) if grid_size is None else check_pair("grid_size", grid_size)
            ranks = [dispersed_rank(height, width, x.device, route) for route in range(routes)]
            return -torch.stack(ranks).float().expand(batch, -1, -1)  # exact up to 4096 x 4096 tokens
        with without_autocast(x.device.type):
            if self.router == "mean_query":
                return route_by_mean_query(x, query, key, routes, mask)
            return self._learned_logits(x, routing_tokens)

    def _learned_logits(self, x: Tensor, routing_tokens: Tensor | None) -> Tensor:
        if self.routing_token is not None:
            tokens = self.routing_token
        elif routing_tokens is None:
            raise ValueError("routing_tokens: needed, the router has learned_routing_tokens=False")
        else:
            check_float_tensor("routing_tokens", routing_tokens)
            tokens = routing_tokens.unsqueeze(1) if routing_tokens.ndim == 2 else routing_tokens
            expected = (x.shape[0], self.num_routing_tokens, self.dim)
            if tuple(tokens.shape) != expected:
                raise ValueError(f"routing_tokens: expected shape {expected}, got {tuple(routing_tokens.shape)}")
        return _compare(x, self._directions(tokens, x), self.normalize)

    def _directions(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Routing tokens as :func:`~colt5_vision.ops.router_logits` takes them, in the dtype of the logits of ``x``."""
        tokens = tokens.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if self.cosine_sim_scale is None:
            return tokens
        return self.cosine_sim_scale * nn.functional.normalize(tokens, dim=-1, eps=_TINY)

    def wants_soft_gates(self, logits: Tensor) -> bool:
        """Whether anyone will see the soft gates of ``logits``: straight through they are for a gradient only."""
        # an ONNX file is for inference
        trains = torch.is_grad_enabled() and logits.requires_grad and not torch.onnx.is_in_onnx_export()
        return self.router not in ("random", "grid") and (trains or not self.straight_through)

    def soft_gates(self, logits: Tensor, k: float | Tensor, **how) -> Tensor:
        """:func:`~colt5_vision.gates.soft_gates` of logits (..., N) with sum ``k``, by this router's relaxation."""
        own = {name: getattr(self, name) for name in ("method", "n_iters", "eps", "eps_init", "eps_decay")}
        return soft_gates(logits, k, **{**own, **how})

    def straight(self, gates: Tensor) -> Tensor:
        """Soft gates, of any shape, as the forward pass uses them: passed straight through, or as they are."""
        if not self.straight_through:
            return gates
        gradient = _log(gates) if self.log_gradient else gates
        return 1 + (gradient - gradient.detach())

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
            num_tokens: how many, an int >= 1 (above N: all of them) or a float in (0, 1], that share of N.
            counts: (B,), how many of these slots each sample fills: integers >= 1, or floats in (0, 1], that share of
                its valid tokens (rounded, at least one). What exceeds the slots is cut.
            mask: (B, N) bool, True = valid. Masked tokens are never routed while a valid one is left.
            routing_tokens: (B, R, C) (or (B, C) for R = 1), in place of learned ones; entries of unit scale.
            grid_size: (H, W) of the map; needed by ``cell_size``, used by ``router="grid"``.
            query, key: (B, heads, N, head_dim), what ``router="mean_query"`` compares (default: the tokens themselves).
            generator: draws ``router="random"`` anew; default: the same choice for the same shape. Or the noise of
                ``method="gumbel_sinkhorn"``; default: none.
            logits: (B, R, N), in place of :meth:`logits` of the arguments above: where they are known already, as from
                :func:`learned_logits`.

        Returns:
            :class:`Routing` of (B, R, K).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        noise, generator = (generator, None) if self.method == "gumbel_sinkhorn" else (None, generator)
        compared = {"routing_tokens": routing_tokens, "query": query, "key": key, "generator": generator}
        if logits is None:
            logits = self.logits(x, mask=mask, grid_size=grid_size, **compared)
        else:
            self._check_tokens(x, mask, grid_size)
            check_float_tensor("logits", logits)
            expected = (x.shape[0], self.num_routing_tokens, x.shape[1])
            if tuple(logits.shape) != expected:
                raise ValueError(f"logits: expected shape {expected}, got {tuple(logits.shape)}")
            for name, value in compared.items():
                if value is not None:
                    raise ValueError(f"{name}: only used to compute logits, which are given")
        n = x.shape[1]
        if self.route_block_size is not None and grid_size is None:
            grid_size = (1, n)
        if self.cell_size is not None and grid_size is None:
            raise ValueError("grid_size: needed, the router has a cell_size")
        slots = token_count("num_tokens", num_tokens, n)
        per_route = None if mask is None else mask.unsqueeze(1).expand(-1, self.num_routing_tokens, -1)
        stratified = {} if self.cell_size is None else {"grid_size": grid_size, "cell_size": self.cell_size}
        k, variable = slots, {}
        if counts is not None:
            k = filled_slots("counts", counts, slots, x, mask).unsqueeze(-1).expand(-1, self.num_routing_tokens)
            variable = {"num_slots": slots}
        indices, valid = route_topk(logits, k, mask=per_route, **variable, **stratified)

        if not self.wants_soft_gates(logits):
            gates = torch.ones_like(indices, dtype=logits.dtype)
            log_weights = torch.zeros_like(gates)
        else:
            sums = budget = min(slots * self.fetch_k_ratio, n)
            if counts is not None:
                wide = torch.float32 if x.device.type == "mps" else torch.float64  # as a number is: the same digits
                sums = (k.to(wide) * self.fetch_k_ratio).clamp_max(budget)
            how = {"mask": per_route, "generator": noise, **stratified}
            if self.n_iters is not None and counts is None and self.method == "coordinate_descent" and slots == n:
                how.update(n_iters=None, eps_init=None, eps_decay=1.0)  # all are taken: 1, which iterations approach
            soft = self.soft_gates(logits, sums, max_k=budget, **how).gather(-1, indices)
            gates, log_weights = self.straight(soft), _log(soft)
            if self.straight_through:
                log_weights = log_weights - log_weights.detach()
        gates = torch.where(valid, gates, 0)
        return Routing(indices, gates, torch.where(valid, log_weights, float("-inf")), valid)


def learned_logits(routers: Sequence[CoordinateDescentRouter], x: Tensor) -> tuple[Tensor, ...]:
    """Logits of several learned routers of the same tokens, from one read of them.

    Args:
        routers: of kind ``"learned"``, with routing tokens of their own, all with the same ``normalize``.
        x: (B, N, C) tokens.

    Returns:
        (B, R, N) of each router, what its :meth:`CoordinateDescentRouter.logits` gives.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for index, router in enumerate(routers):
        if router.routing_token is None:
            raise ValueError(f"routers[{index}]: expected learned routing tokens, got none (router={router.router!r})")
        if router.normalize != routers[0].normalize:
            raise ValueError(f"routers[{index}]: expected normalize={routers[0].normalize} as the first")
        router._check_tokens(x, None, None)
    with without_autocast(x.device.type):
        tokens = [router._directions(router.routing_token, x) for router in routers]
        return _compare(x, torch.cat(tokens), routers[0].normalize).split([len(t) for t in tokens], 1)
