"""Token counts of a layer, and what a training in progress makes of them."""

from typing import NamedTuple

from torch import nn

from .checks import TokenCount, hint_at_converter


class Narrowing(NamedTuple):
    """How token counts get from many to few: ``hold``, ``until`` and ``alternate`` of
    :class:`~colt5_vision.RoutingSchedule`."""

    hold: float
    until: float
    alternate: bool


# What each fusion learned best with in 1,200 steps of ``benchmarks.needle``. The heavy branch of
# "sum" has weights of its own. They must have learned before it may lose a key.
NARROW_SOFTMAX = Narrowing(0.1, 0.7, True)
NARROW_SUM = Narrowing(0.4, 0.7, False)


class ScheduledLayer(nn.Module):
    """A layer with token counts, which a :class:`~colt5_vision.RoutingSchedule` may multiply.

    The factors belong to the training in progress. They hold in training mode only, and a copy or a
    pickle of the layer does not have them.

    Attributes:
        key_factor, query_factor: how many times its own keys (queries) the layer routes now.
        narrowing: how a schedule lowers the factors by default.
    """

    key_factor: int = 1
    query_factor: int = 1
    narrowing: Narrowing = NARROW_SUM

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(hint_at_converter)

    def __getstate__(self) -> dict:
        transient = ("key_factor", "query_factor")
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def keys_now(self, count: TokenCount) -> TokenCount:
        """The layer's own ``count`` of keys, times the factor of the training in progress."""
        return _times(count, self.key_factor) if self.training else count

    def queries_now(self, count: TokenCount | None) -> TokenCount | None:
        """The same of queries; None stays None."""
        return _times(count, self.query_factor) if self.training and count is not None else count


def _times(count: TokenCount, factor: int) -> TokenCount:
    return count * factor if isinstance(count, int) else min(1.0, count * factor)
