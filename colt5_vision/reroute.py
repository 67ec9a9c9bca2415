"""What the swap-ins share: other code's scaled dot-product attention rerouted, and the size of the map it runs over."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .ops.routed_window_attention.gathered import PairBias

_SDPA = nn.functional.scaled_dot_product_attention
_MARK = "_colt5_map_size"  # on the input of a block: the size of the map it belongs to


class RerouteAttention(TorchFunctionMode):
    """Within it, ``attend`` is called in place of ``scaled_dot_product_attention``, with the same arguments."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self.attend if func is _SDPA else func)(*args, **(kwargs or {}))


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


class MapSize:
    """The (H, W) of the forward in progress; never that of an earlier one.

    A pass begins with :meth:`begin` and serves each attention module once. In backward a checkpointed block runs again
    on the very tensor it got first, which :class:`BlockMarker` marked with the size of its own forward.

    Attributes:
        size: (H, W) in tokens; None: unknown.
        num_text: tokens of a text that runs along, in some layers in one sequence with the map.
    """

    def __init__(self):
        self.size: tuple[int, int] | None = None
        self.num_text = 0
        self.recomputed: tuple[tuple[int, int] | None, int] = (None, 0)
        self.passes = 0
        self.served = True

    def begin(self, size: tuple[int, int] | None, num_text: int = 0) -> None:
        if torch.compiler.is_compiling():  # one trace is one forward: nothing can be stale within it
            self.size, self.num_text = size, num_text
            return
        if _in_backward():  # the whole map is made again, not a block alone
            self.recomputed = (size, num_text)
            return
        # a pass that no attention has followed may still be to come: its tokens must not meet the size of this one
        before = size if self.served else self.size
        known = before is not None and size is not None
        mixed = known and before != size and before[0] * before[1] == size[0] * size[1]
        self.size, self.num_text, self.served = None if mixed else size, num_text, False
        self.passes += 1

    def for_tokens(self, attention: nn.Module, num_tokens: int, with_text: bool = False) -> tuple[int, int] | None:
        """(H, W) of the map whose ``num_tokens`` tokens, the text's among them if ``with_text``, reached ``attention``;
        None if no pass belongs to them."""
        self.served = True
        size, num_text = self.size, self.num_text
        if not torch.compiler.is_compiling():
            if _in_backward():
                size, num_text = self.recomputed
            else:
                size = None if attention.__dict__.get("served_pass") == self.passes else size
                attention.__dict__["served_pass"] = self.passes
        if size is None:
            return None
        return size if size[0] * size[1] + (num_text if with_text else 0) == num_tokens else None


class BlockMarker:
    """A forward pre-hook (``with_kwargs``) of a block, whose first argument, or ``hidden_states``, is the tokens."""

    def __init__(self, map_size: MapSize):
        self.map_size = map_size

    def __call__(self, block: nn.Module, args, kwargs) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return
        if not _in_backward():
            setattr(x, _MARK, (self.map_size.size, self.map_size.num_text))
        elif hasattr(x, _MARK):
            self.map_size.recomputed = getattr(x, _MARK)
        elif x.grad_fn is None:  # a detached copy starts here, not the output of the block before
            self.map_size.recomputed = (None, 0)


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
