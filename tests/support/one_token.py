"""Where a map lies among the tokens of the first routed layer: seen by changing one of them."""

from collections.abc import Callable

from colt5_vision import route_attention
from colt5_vision.swap import reroute
from colt5_vision.swap.site import Site


def one_token(
    model, run: Callable[[tuple[int, ...] | None], object], grid: tuple[int, ...], monkeypatch
) -> tuple[Site, int]:
    """One patch of the image changes one row of the first layer's queries: that of its token.

    Args:
        model: not routed yet.
        run: runs it, with the patch at a place of the grid changed, or as it is (None).
        grid: (H, W) or (T, H, W) that is expected.

    Returns:
        The site, and how many layers were routed in a run.
    """
    seen, original = [], reroute.RoutedLayer.route

    def route(self, layer, now, call):
        seen.append((now.site, call.query))
        return original(self, layer, now, call)

    monkeypatch.setattr(reroute.RoutedLayer, "route", route)
    route_attention(model, window_size=3, num_heavy_tokens_kv=1.0, min_tokens=0)
    run(None)
    (site, first), layers = seen[0], len(seen)
    assert site.grid == (grid if len(grid) == 3 else (1, *grid))

    for place in ((0,) * len(grid), tuple(n - 2 for n in grid)):
        seen.clear()
        run(place)
        token = 0
        for n, side in zip(place, grid):
            token = token * side + n
        token = token if site.order is None else int(seen[0][0].order[0, token])
        rows = (seen[0][1] - first).abs().amax((0, 1, 3)).nonzero().flatten().tolist()
        assert rows == [site.before + token]
    return site, layers
