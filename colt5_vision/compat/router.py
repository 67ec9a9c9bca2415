"""The router with colt5_attention's arguments, and with the relaxations that it once had."""

import copy

import torch
from torch import Tensor, nn

from .. import router as core
from .._fx import fx_leaf
from ..checks import check_int
from ..routing import Routing
from .relaxations import cumulative_softmax, gumbel_sinkhorn
from .switches import check_switches

METHODS = ("coordinate_descent", "cumulative_softmax", "gumbel_sinkhorn")


class CoordinateDescentRouter(core.CoordinateDescentRouter):
    """:class:`colt5_vision.CoordinateDescentRouter` with the arguments of colt5_attention.

    Args:
        dim: width C of the tokens.
        *args: of the core's router; up to ``learned_routing_tokens`` they come in the order of
            colt5_attention.
        route_block_size: stratify: each stretch of this many tokens gets its share of the slots,
            ``cell_size=(1, route_block_size)``.
        method: the relaxation of top-k that gives the soft gates. ``"coordinate_descent"``, or for
            comparison :func:`~colt5_vision.compat.cumulative_softmax` or
            :func:`~colt5_vision.compat.gumbel_sinkhorn` (of ``n_iters`` iterations, default 50).
        use_triton: None or True, kernels are used wherever they can run.
        triton_checkpoint_segments: None, backward has nothing to recompute.
        **options: of the core's router.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: colt5-attention 0.11.2.
    """

    method: str = "coordinate_descent"
    _noise: torch.Generator | None = None  # only of the copy that a call with noise works on

    def __init__(
        self,
        dim: int,
        *args,
        route_block_size: int | None = None,
        method: str = "coordinate_descent",
        use_triton: bool | None = None,
        triton_checkpoint_segments: None = None,
        **options,
    ):
        given = {
            "route_block_size": route_block_size,
            "use_triton": use_triton,
            "triton_checkpoint_segments": triton_checkpoint_segments,
        }
        super().__init__(dim, *args, **core_options({**options, **given}))
        self._set_method(method)

    def _set_method(self, method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
        if method != "coordinate_descent":
            if self.kind in ("random", "grid"):
                raise ValueError(f"method: router={self.kind!r} has gates of 1, got {method!r}")
            if self.eps_init is not None or self.eps_decay != 1.0:
                raise ValueError(
                    f"eps_init, eps_decay: only used by method='coordinate_descent', got {method!r}"
                )
            if self.n_iters is not None and method == "cumulative_softmax":
                raise ValueError("n_iters: method='cumulative_softmax' has no iterations to choose")
        self.method = method

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method!r}"

    def relax(
        self, logits: Tensor, k: float | Tensor, max_k: float, *, mask: Tensor | None
    ) -> Tensor:
        """The relaxation of top-k, see :meth:`colt5_vision.CoordinateDescentRouter.relax`."""
        if self.method == "cumulative_softmax":
            return cumulative_softmax(logits, k, eps=self.eps, mask=mask)
        if self.method == "gumbel_sinkhorn":
            iterations = {} if self.n_iters is None else {"n_iters": self.n_iters}
            how = {"eps": self.eps, "mask": mask, "generator": self._noise, **iterations}
            return gumbel_sinkhorn(logits, k, **how)
        return super().relax(logits, k, max_k, mask=mask)

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        grid_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        random_route: bool | None = None,
        keep_one_route_dim: bool | None = None,
        **how,
    ) -> Routing:
        """Choose tokens.

        Args:
            x: (B, N, C).
            grid_size: (H, W) of a map. None: a line, where stretches are stratified.
            generator: draws ``router="random"`` anew; or the noise of ``method="gumbel_sinkhorn"``,
                None: no noise.
            random_route: None or False, ``router="random"`` of the module is that.
            keep_one_route_dim: None or True, a :class:`Routing` has a dimension of routes.
            **how: of the core's router, ``num_tokens`` among them.

        Returns:
            :class:`Routing` of (B, R, K).

        Raises:
            TypeError, ValueError: for bad arguments.
        """
        check_switches(random_route=random_route, keep_one_route_dim=keep_one_route_dim)
        in_stretches = self.cell_size is not None and self.cell_size[0] == 1
        if grid_size is None and in_stretches and isinstance(x, Tensor) and x.ndim == 3:
            grid_size = (1, x.shape[1])
        if generator is None or self.method != "gumbel_sinkhorn":
            return super().forward(x, grid_size=grid_size, generator=generator, **how)

        # a shallow copy has the same weights: the generator is of this call, whatever threads do
        noisy = copy.copy(self)
        noisy._noise = generator
        return noisy.forward(x, grid_size=grid_size, **how)


def core_options(options: dict | None) -> dict:
    """Arguments of a router here as the core's takes them. ``method``, which it lacks, is left out.

    Raises:
        TypeError, ValueError: for bad arguments.
    """
    options = dict(options or {})
    options.pop("method", None)
    switches = ("use_triton", "triton_checkpoint_segments")
    check_switches(**{name: options.pop(name, None) for name in switches})

    block = options.pop("route_block_size", None)
    if block is not None:
        if options.get("cell_size") is not None:
            raise ValueError(
                "route_block_size: there is a cell_size already, expected one of the two"
            )
        options["cell_size"] = (1, check_int("route_block_size", block))
    return options


def adopt_routers(layer: nn.Module, options: dict | None) -> None:
    """Make the routers of a layer of the core those of this file.

    They keep their weights and arguments, and get the ``method`` of ``options``. The core's layers
    make their routers themselves, so that their class is changed afterwards, as
    ``torch.nn.utils.parametrize`` does.

    Args:
        layer: has routers.
        options: ``router_kwargs`` of the layer.

    Raises:
        TypeError, ValueError: for bad arguments.
    """
    method = (options or {}).get("method", "coordinate_descent")
    for router in layer.modules():
        if isinstance(router, core.CoordinateDescentRouter):
            router.__class__ = CoordinateDescentRouter
            router._set_method(method)
