"""Route many tokens at first and fewer as training goes on: a schedule of the token counts of a model's attentions."""

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

# ``hold`` and ``until`` of each fusion. The heavy branch of "sum" has weights of its own, and must have learned before
# it may lose a key: narrowed from .2 to .6 one seed of three forgot all.
NARROWING = {"softmax": (0.2, 0.6), "sum": (0.4, 0.7)}


class RoutingSchedule:
    """Routed attentions of a model start with a multiple of their token counts and end with their own.

    A router learns which tokens matter from those that it routes. Where it may route few from the start, and not the
    ones that matter, there is nothing to learn from; with many there is, and by the time they are few it has learned
    (``python -m benchmarks.needle``, ``python -m benchmarks.ablations``). Counts are halved, not scaled: a compiled
    model sees a handful of them.

    Call :meth:`step` before every training step, and with 1.0 before an evaluation on the way. The schedule is a
    function of progress: there is nothing to save in a checkpoint.

    Args:
        model: with ``ConditionalRouted...Attention`` in it, whose counts are changed in place.
        keys: a power of 2, how many times its own ``num_heavy_tokens_kv`` (``num_tokens_kv``) an attention has at
            first.
        queries: the same of ``num_heavy_tokens_q`` (``num_tokens_q``), where that is not None.
        hold: share of the training with the first counts.
        until: share of the training after which the counts are their own; in between they are halved in even steps.
            Default of both: .2 and .6 for attentions of ``fusion="softmax"``, .4 and .7 for all others.

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
    ):
        for name, times in (("keys", keys), ("queries", queries)):
            if check_int(name, times) & (times - 1):
                raise ValueError(f"{name}: expected a power of 2, got {times}")
        if (hold is None) != (until is None):
            raise ValueError(f"hold, until: expected both or none, got {hold} and {until}")
        if hold is not None and not 0 <= hold <= until <= 1:
            raise ValueError(f"hold, until: expected 0 <= hold <= until <= 1, got {hold} and {until}")
        modules = [module for module in model.modules() if isinstance(module, _ATTENTIONS)]
        if not modules:
            raise ValueError(f"model: expected attentions of colt5_vision, {type(model).__name__} has none")
        names = {"num_heavy_tokens_kv": keys, "num_tokens_kv": keys}
        names |= {"num_heavy_tokens_q": queries, "num_tokens_q": queries}
        self._counts = []
        for module in modules:
            span = NARROWING[getattr(module, "fusion", "sum")] if hold is None else (hold, until)
            counts = [(name, getattr(module, name, None), times) for name, times in names.items()]
            self._counts += [(module, name, own, times, span) for name, own, times in counts if own is not None]

    def step(self, progress: float) -> None:
        """Set the counts for ``progress``, the share of the training that is done, in [0, 1].

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: expected a number in [0, 1], got {progress}")
        for module, name, own, times, span in self._counts:
            now = own * _times(times, progress, *span)
            setattr(module, name, now if isinstance(own, int) else min(1.0, now))


def _times(times: int, progress: float, hold: float, until: float) -> int:
    """``times``, halved in even steps between ``hold`` and ``until`` until it is 1."""
    if progress >= until:
        return 1
    if progress <= hold:
        return times
    done = (progress - hold) / (until - hold)
    return times >> int(done * (times.bit_length() - 1))
