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
        keys: a power of 2, how many times its own ``num_heavy_tokens_kv`` (``num_tokens_kv``) an attention has at first.
        queries: the same of ``num_heavy_tokens_q`` (``num_tokens_q``), where that is not None.
        hold: share of the training with the first counts.
        until: share of the training after which the counts are their own; in between they are halved in even steps.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, model: nn.Module, keys: int = 16, queries: int = 1, *, hold: float = 0.2, until: float = 0.6):
        for name, times in (("keys", keys), ("queries", queries)):
            if check_int(name, times) & (times - 1):
                raise ValueError(f"{name}: expected a power of 2, got {times}")
        if not 0 <= hold <= until <= 1:
            raise ValueError(f"hold, until: expected 0 <= hold <= until <= 1, got {hold} and {until}")
        self.hold, self.until = hold, until
        modules = [module for module in model.modules() if isinstance(module, _ATTENTIONS)]
        if not modules:
            raise ValueError(f"model: expected attentions of colt5_vision, {type(model).__name__} has none")
        names = {"num_heavy_tokens_kv": keys, "num_tokens_kv": keys}
        names |= {"num_heavy_tokens_q": queries, "num_tokens_q": queries}
        counts = [(m, name, getattr(m, name, None), times) for m in modules for name, times in names.items()]
        self._counts = [entry for entry in counts if entry[2] is not None]

    def step(self, progress: float) -> None:
        """Set the counts for ``progress``, the share of the training that is done, in [0, 1].

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: expected a number in [0, 1], got {progress}")
        for module, name, own, times in self._counts:
            now = own * self._times(times, progress)
            setattr(module, name, now if isinstance(own, int) else min(1.0, now))

    def _times(self, times: int, progress: float) -> int:
        if progress >= self.until:
            return 1
        if progress <= self.hold:
            return times
        done = (progress - self.hold) / (self.until - self.hold)
        return times >> int(done * (times.bit_length() - 1))
