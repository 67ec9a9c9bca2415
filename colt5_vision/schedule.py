"""Route many tokens at first and fewer as training goes on: a schedule of the token counts of a model's attentions."""

from typing import NamedTuple

from torch import nn

from .attention import ConditionalRoutedImageAttention
from .autoregressive import ConditionalRoutedAutoregressiveAttention
from .checks import check_int
from .cross_attention import ConditionalRoutedCrossAttention
from .sequence import ConditionalRoutedAttention

_ATTENTIONS = (
    ConditionalRoutedImageAttention,
    ConditionalRoutedAttention,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedAutoregressiveAttention,
)


class Narrowing(NamedTuple):
    """How token counts get from many to few: ``hold``, ``until`` and ``alternate`` of :class:`RoutingSchedule`."""

    hold: float
    until: float
    alternate: bool


# What each fusion learned best with in 1,200 steps of ``benchmarks.needle`` (in 600, "softmax" did better halving). The
# heavy branch of "sum" has weights of its own, and must have learned before it may lose a key: with straight-through
# gates, narrowed from .2 to .6 one seed of three forgot all, as here one of six a part, and alternating cost it. With
# soft gates, as here, none of six forgot; other times were not tried (docs/results.md).
NARROWING = {"softmax": Narrowing(0.1, 0.7, True), "sum": Narrowing(0.4, 0.7, False)}


class RoutingSchedule:
    """Routed attentions of a model start with a multiple of their token counts and end with their own.

    A router learns which tokens matter from those that it routes. Where it may route few from the start, and not the
    ones that matter, there is nothing to learn from; with many there is, and by the time they are few it has learned
    (``python -m benchmarks.needle``, ``python -m benchmarks.ablations``). Counts take a handful of values, so a
    compiled model sees few.

    Call :meth:`step` before every training step, and with 1.0 before an evaluation on the way. There is nothing to save
    in a checkpoint: the counts are a function of progress and, where they alternate, of which step's turn it is.

    Args:
        model: with ``ConditionalRouted...Attention`` in it, whose counts are changed in place.
        keys: a power of 2, how many times its own ``num_heavy_tokens_kv`` (``num_tokens_kv``) an attention has at
            first.
        queries: the same of ``num_heavy_tokens_q`` (``num_tokens_q``), where that is not None.
        hold: share of the training with the first counts.
        until: share of the training after which the counts are their own. Default of both: .1 and .7 for attentions of
            ``fusion="softmax"``, .4 and .7 for all others.
        alternate: in between, steps have in turn the first counts, from which all tokens go on learning, and the
            module's own, from which the router does. If False, the counts are halved in even steps. Default: True for
            attentions of ``fusion="softmax"``, False for all others; in short trainings False may do better
            (docs/results.md).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: int = 16,
        queries: int = 1,
        *,
        hold: float | None = None,
        until: float | None = None,
        alternate: bool | None = None,
    ):
        for name, times in (("keys", keys), ("queries", queries)):
            if check_int(name, times) & (times - 1):
                raise ValueError(f"{name}: expected a power of 2, got {times}")
        if (hold is None) != (until is None):
            raise ValueError(f"hold, until: expected both or none, got {hold} and {until}")
        if not (alternate is None or isinstance(alternate, bool)):
            raise TypeError(f"alternate: expected True, False or None, got {alternate!r}")
        if hold is not None and not 0 <= hold <= until <= 1:
            raise ValueError(f"hold, until: expected 0 <= hold <= until <= 1, got {hold} and {until}")
        modules = [module for module in model.modules() if isinstance(module, _ATTENTIONS)]
        if not modules:
            raise ValueError(f"model: expected attentions of colt5_vision, {type(model).__name__} has none")
        names = {"num_heavy_tokens_kv": keys, "num_tokens_kv": keys}
        names |= {"num_heavy_tokens_q": queries, "num_tokens_q": queries}
        given = {"hold": hold, "until": until, "alternate": alternate}
        given = {name: value for name, value in given.items() if value is not None}
        self._counts, self._turn = [], 0
        for module in modules:
            how = NARROWING[getattr(module, "fusion", "sum")]._replace(**given)
            counts = [(name, getattr(module, name, None), times) for name, times in names.items()]
            self._counts += [(module, name, own, times, how) for name, own, times in counts if own is not None]

    def step(self, progress: float) -> None:
        """Set the counts for ``progress``, the share of the training that is done, in [0, 1].

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: expected a number in [0, 1], got {progress}")
        for module, name, own, times, how in self._counts:
            now = own * _times(times, progress, how, self._turn)
            setattr(module, name, now if isinstance(own, int) else min(1.0, now))
        self._turn += progress < 1  # an evaluation takes no training step's turn


def _times(times: int, progress: float, how: Narrowing, turn: int) -> int:
    """How many times its own count a module has now: ``times`` until ``how.hold``, 1 from ``how.until``."""
    if progress >= how.until:
        return 1
    if progress <= how.hold:
        return times
    if how.alternate:
        return times if turn % 2 else 1
    done = (progress - how.hold) / (how.until - how.hold)
    return times >> int(done * (times.bit_length() - 1))
