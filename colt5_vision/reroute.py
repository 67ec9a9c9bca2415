"""What the swap-ins share: other code's scaled dot-product attention rerouted, and the size of the map it runs over."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .ops.routed_window_attention.gathered import PairBias

_SDPA = nn.functional.scaled_dot_product_attention
# The size of the map that a compiled block belongs to, as the shape of a tensor without content, and whose it is: a
# compiler makes a constant of an int that it finds on a module, and a graph for each size, but not of a shape.
_SHAPE: Tensor = torch.empty(0)
_OWNER: "MapSize | None" = None
_MARK = "_colt5_map_size"  # on the input of a block: the size of the map it belongs to


class RerouteAttention(TorchFunctionMode):
    """Within it, ``attend`` is called in place of ``scaled_dot_product_attention``, with the same arguments.

    Raises:
        RuntimeError: on leaving it, if nobody called that function: other code stands in its place, and what was to be
            routed was not.
    """

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend
        self.called = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        self.called = True
        return self.attend(*args, **(kwargs or {}))

    def __exit__(self, kind, error, traceback):
        super().__exit__(kind, error, traceback)
        if kind is None and not self.called:
            raise RuntimeError(
                "scaled_dot_product_attention: expected a call of torch's own function to route, got none; has other "
                "code replaced it?"
            )


def autocast_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast would give scaled dot-product attention."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def read_mask(attn_mask: Tensor | None, q: Tensor) -> tuple[Tensor | None, PairBias | None]:
    """The mask of ``scaled_dot_product_attention`` for q (B, heads, L, D) as a key mask (B, L) or a pair bias."""
    if attn_mask is None:
        return None, None
    batch, heads, length, _ = q.shape
    mask = attn_mask.reshape(*(1,) * (4 - attn_mask.ndim), *attn_mask.shape)
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0].expand(batch, length), None
    mask = mask.expand(batch, heads, length, length)
    b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1, 1)
    h = torch.arange(heads, device=q.device).view(1, -1, 1, 1, 1)

    def bias(i: Tensor, j: Tensor) -> Tensor:
        chosen = mask[b, h, i, j]
        return chosen if chosen.dtype != torch.bool else torch.where(chosen, 0.0, float("-inf"))

    return None, bias


def _in_backward() -> bool:
    """A checkpointed block runs again."""
    return torch._C._current_graph_task_id() != -1


class Pass(NamedTuple):
    """One forward over a map."""

    size: tuple[int, int] | None  # (H, W) in tokens; None: unknown
    num_text: int = 0  # tokens of a text that runs along, in some layers in one sequence with the map
    timestep: float | None = None  # of a diffusion model


class MapSize:
    """What attention modules must know of the forward in progress; never that of an earlier one.

    A pass begins with :meth:`begin` and serves each attention module once. In backward a checkpointed block runs again
    on the very tensor it got first, which :class:`BlockMarker` marked with its own pass. One model must not run in
    several threads at once.

    Args:
        apart: other passes may begin between :meth:`begin` and the blocks, as when a model's embedding is used alone;
            their tokens are then not mistaken for those of a map of another shape.
    """

    def __init__(self, apart: bool = True):
        self.apart = apart
        self.now = Pass(None)
        self.recomputed = Pass(None)
        self.made_anew = False  # recomputed is that of a whole map, not of one block
        self.passes = 0
        self.served = True

    @property
    def size(self) -> tuple[int, int] | None:
        return self.now.size

    def begin(self, size: tuple[int, int] | None, num_text: int = 0, timestep: float | None = None) -> None:
        new = Pass(size, num_text, timestep)
        if not torch.compiler.is_compiling() and _in_backward():
            self.recomputed, self.made_anew = new, True
            return
        if not torch.compiler.is_compiling():  # one trace is one forward: nothing can be stale within it
            pending = None if self.served or not self.apart else self.size  # its tokens must not meet this size
            if None not in (pending, size) and pending != size and pending[0] * pending[1] == size[0] * size[1]:
                new = Pass(None)
            self.made_anew, self.served = False, False
            self.passes += 1
        self.now = new
        global _SHAPE, _OWNER
        _SHAPE, _OWNER = torch.empty(1).expand(new.size or (0, 0)), self

    def for_tokens(self, attention: nn.Module, num_tokens: int, with_text: bool = False) -> Pass | None:
        """The pass whose ``num_tokens`` tokens, the text's among them if ``with_text``, reached ``attention``, or None.

        Raises:
            ValueError: in backward, if ``attention`` runs again on tokens of no known pass.
        """
        self.served = True
        if torch.compiler.is_compiling():
            return self._compiled(num_tokens, with_text)
        found = self.now
        memory = attention.__dict__
        if _in_backward():
            found = self.recomputed
        elif memory.get("served_pass", (None,))[0] == self.passes:
            found = Pass(None)
        fits = found.size is not None
        if fits:
            fits = found.size[0] * found.size[1] + (found.num_text if with_text else 0) == num_tokens
        if not _in_backward():
            memory["served_pass"] = (self.passes, fits)
        elif not fits and memory.get("served_pass", (None, False))[1]:
            raise ValueError(
                "checkpointing: the size of the map behind a recomputed block is unknown; expected use_reentrant=False, "
                "around whole blocks"
            )
        return found if fits else None

    def _compiled(self, num_tokens: int, with_text: bool) -> Pass | None:
        if _OWNER is not self:
            return None
        height, width = _SHAPE.shape
        text = self.now.num_text if with_text else 0
        if height == 0 or height * width + text != num_tokens:
            return None
        return Pass((height, width), text, self.now.timestep)


class BlockMarker:
    """A forward pre-hook (``with_kwargs``) of a block, whose first argument, or ``hidden_states``, is the tokens."""

    def __init__(self, map_size: MapSize):
        self.map_size = map_size

    def __call__(self, block: nn.Module, args, kwargs) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return
        if not _in_backward():
            setattr(x, _MARK, self.map_size.now)
        elif hasattr(x, _MARK):
            self.map_size.recomputed, self.map_size.made_anew = getattr(x, _MARK), False
        elif x.grad_fn is None and not self.map_size.made_anew:
            self.map_size.recomputed = Pass(None)  # a detached copy starts here, not the output of the block before


def remove_hooks(model: nn.Module, kinds: tuple[type, ...]) -> None:
    """Take the forward hooks and pre-hooks of these classes off a model."""
    for module in model.modules():
        for hooks, extra in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
                del hooks[key]
                extra.pop(key, None)
