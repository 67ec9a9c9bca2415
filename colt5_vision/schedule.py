"""Route many tokens at first and fewer as training goes on: a schedule of the token counts of a
model's attentions."""

import numbers

import torch
from torch import Tensor, nn

from ._fx import fx_leaf
from ._torch_internals import (
    count_up,
    holds_number,
    in_backward,
    is_exporting,
    times_written,
)
from .checks import check_int
from .scheduled import Narrowing, ScheduledLayer


class RoutingSchedule:
    """Routed attentions of a model start with a multiple of their token counts and end with their
    own.

    A router learns which tokens matter from those that it routes. Where it may route few from the
    start, and not the ones that matter, there is nothing to learn from. With many there is, and by
    the time they are few it has learned (``python -m benchmarks.needle``,
    ``python -m benchmarks.ablations``).

    Call :meth:`step` before every training step. The layers keep their own counts: the schedule
    only sets a factor, which holds in training mode. In evaluation mode, in a copy (an EMA, say)
    and in a pickle the counts are the layer's own. There is nothing to save in a checkpoint. Counts
    take a handful of values, so a compiled model sees few.

    Args:
        model: with ``ConditionalRouted...Attention`` in it.
        key_factor: a power of 2, how many times its own keys an attention routes at first.
        query_factor: the same of queries, where they are routed.
        hold: share of the training with the first counts.
        until: share of the training after which the counts are their own. Default of both: 0.1 and
            0.7 for attentions of ``fusion="softmax"``, 0.4 and 0.7 for all others.
        alternate: in between, steps have in turn the first counts, from which all tokens go on
            learning, and the layer's own, from which the router does. If False, the counts are
            halved in even steps. Default: True for attentions of ``fusion="softmax"``, False for
            all others; in short trainings False may do better
            (docs/notes/2026-11-22-needle.md).

    Raises:
        TypeError, ValueError: for bad arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        key_factor: int = 16,
        query_factor: int = 1,
        *,
        hold: float | None = None,
        until: float | None = None,
        alternate: bool | None = None,
    ):
        for name, times in (("key_factor", key_factor), ("query_factor", query_factor)):
            if check_int(name, times) & (times - 1):
                raise ValueError(f"{name}: expected a power of 2, got {times}")
        if (hold is None) != (until is None):
            raise ValueError(f"hold, until: expected both or none, got {hold} and {until}")
        if not (alternate is None or isinstance(alternate, bool)):
            raise TypeError(f"alternate: expected True, False or None, got {alternate!r}")
        if hold is not None and not 0 <= hold <= until <= 1:
            raise ValueError(
                f"hold, until: expected 0 <= hold <= until <= 1, got {hold} and {until}"
            )
        if any(isinstance(module, CarriedSchedule) and module.runs for module in model.modules()):
            raise ValueError(
                "model: expected one without a schedule, it carries its own (routing_schedule)"
            )
        layers = [module for module in model.modules() if isinstance(module, ScheduledLayer)]
        if not layers:
            raise ValueError(
                f"model: expected attentions of colt5_vision, {type(model).__name__} has none"
            )
        given = {"hold": hold, "until": until, "alternate": alternate}
        given = {name: value for name, value in given.items() if value is not None}
        self.key_factor, self.query_factor = key_factor, query_factor
        self._layers = [(layer, layer.narrowing._replace(**given)) for layer in layers]
        self._turn = 0

    def step(self, progress: float, turn: int | None = None) -> None:
        """Set the factors for the next training step.

        Args:
            progress: the share of the training that is done, in [0, 1].
            turn: number of that step. Where counts alternate, odd steps have the first ones. None:
                one more than the last.

        Raises:
            TypeError, ValueError: for another ``progress``.
        """
        if not isinstance(progress, numbers.Real):
            raise TypeError(
                f"progress: expected a number in [0, 1], got {progress!r} "
                f"({type(progress).__name__})"
            )
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: expected a number in [0, 1], got {progress}")
        self._turn = self._turn if turn is None else turn
        for layer, narrowing in self._layers:
            layer.key_factor = _factor(self.key_factor, progress, narrowing, self._turn)
            layer.query_factor = _factor(self.query_factor, progress, narrowing, self._turn)
        self._turn += progress < 1  # an evaluation takes no training step's turn


def _factor(first: int, progress: float, narrowing: Narrowing, turn: int) -> int:
    """``first`` until ``narrowing.hold``, 1 from ``narrowing.until`` on."""
    if progress >= narrowing.until:
        return 1
    if progress <= narrowing.hold:
        return first
    if narrowing.alternate:
        return first if turn % 2 else 1
    done = (progress - narrowing.hold) / (narrowing.until - narrowing.hold)
    return first >> int(done * (first.bit_length() - 1))


class CarriedSchedule(nn.Module):
    """A :class:`RoutingSchedule` that a model carries: it counts the model's training forwards.

        x ─ in training: one forward more, factors of the attentions set ─ x

    It stands where every input passes once. A training script need not know of it. Forwards in
    evaluation mode and without gradients are not counted, nor are those that gradient checkpointing
    runs again. With gradient accumulation every part of a batch is a forward.

    The count is a buffer. A checkpoint has it, so that a resumed training goes on with the counts
    it had. Weights that come without one start the schedule anew. A model without a schedule takes
    weights with a count, and leaves the count out. :meth:`reset_parameters` starts anew.

    Counting breaks a compiled graph: compile without ``fullgraph=True`` to train. It causes no
    recompilation but for the few values of the factors. The count is read from the device only
    after others wrote it, which DDP does in every forward (``broadcast_buffers``).

    Args:
        model: what holds the attentions. It does not become a part of this module.
        steps: training forwards until the attentions have their own counts for good. None: there is
            no schedule, and no buffer.
        device: of the buffer.

    Attributes:
        forwards: how many training forwards there were, int64 of shape (); or None.

    Raises:
        TypeError, ValueError: for bad arguments.
    """

    def __init__(self, model: nn.Module, steps: int | None, *, device=None):
        super().__init__()
        self.steps = None if steps is None else check_int("routing_schedule", steps)
        forwards = torch.zeros((), dtype=torch.int64, device=device) if self.runs else None
        self.register_buffer("forwards", forwards)
        self.register_load_state_dict_pre_hook(_complete)
        self.follow(model)

    _known: tuple[Tensor, int, int] | None = None  # the buffer, how often written, its value

    @property
    def runs(self) -> bool:
        """Whether there is a schedule."""
        return self.steps is not None

    def follow(self, model: nn.Module) -> None:
        """Schedule the attentions of ``model``, and no others."""
        self._schedule = RoutingSchedule(model) if self.runs else None

    def reset_parameters(self) -> None:
        """Start anew."""
        if self.runs:
            nn.init.zeros_(self.forwards)

    def extra_repr(self) -> str:
        return f"steps={self.steps}"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        counts = self.runs and self.training and torch.is_grad_enabled()
        if counts and not is_exporting():
            self._count()
        return x

    @torch.compiler.disable(reason="a training forward is counted; compile without fullgraph=True")
    def _count(self) -> None:
        if in_backward() or not holds_number(self.forwards):
            return
        done = self._forwards_so_far()
        self._schedule.step(min(1.0, done / self.steps), turn=done)
        count_up(self.forwards)
        self._known = (self.forwards, times_written(self.forwards), done + 1)

    def _forwards_so_far(self) -> int:
        if self._known is not None:
            buffer, written, value = self._known
            if buffer is self.forwards and written == times_written(buffer):
                return value
        return int(self.forwards)


def _complete(schedule: CarriedSchedule, state_dict: dict, prefix: str, *_) -> None:
    """Before ``schedule`` loads: 0 where a count is missing, none where nothing is counted."""
    name = f"{prefix}forwards"
    if schedule.runs:
        state_dict.setdefault(name, torch.zeros((), dtype=torch.int64))
    else:
        state_dict.pop(name, None)
