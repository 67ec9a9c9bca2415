"""The size of the map of the forward in progress, told by a patch embedding to the attention modules behind it."""

import torch
from torch import Tensor, nn

_MARK = "_colt5_grid_size"  # on the input of a block: the size of the map it belongs to


def _in_backward() -> bool:
    """A checkpointed block runs again."""
    return torch._C._current_graph_task_id() != -1


class GridTracker:
    """A forward hook of a patch embedding; ``size_for`` gives the (H, W) it saw, never that of an earlier forward.

    One pass through the patch embedding serves each attention module once. In backward a checkpointed block runs again
    on the very tensor it got first, which :class:`BlockMarker` marked with the size of its own forward.
    """

    def __init__(self):
        self.size: tuple[int, int] | None = None
        self.recomputed: tuple[int, int] | None = None
        self.passes = 0

    def __call__(self, patch_embed: nn.Module, args, output) -> None:
        if isinstance(output, tuple):  # timm's ...WithSize return the size as well
            self.size = tuple(output[1])
        elif output.ndim == 4:
            nchw = str(getattr(patch_embed, "output_fmt", "NCHW")).endswith("NCHW")
            self.size = tuple(output.shape[2:]) if nchw else tuple(output.shape[1:3])
        else:
            self.size = tuple(patch_embed.dynamic_feat_size(args[0].shape[-2:]))
        if not torch.compiler.is_compiling():  # one trace is one forward: nothing can be stale within it
            self.passes += 1

    def size_for(self, attention: nn.Module, num_tokens: int) -> tuple[int, int]:
        """(H, W) of the map whose ``num_tokens`` tokens reached ``attention``.

        Raises:
            ValueError: if no pass through the patch embedding belongs to them.
        """
        if torch.compiler.is_compiling():
            size = self.size
        elif _in_backward():
            size = self.recomputed
        else:
            size = None if attention.__dict__.get("served_pass") == self.passes else self.size
            attention.__dict__["served_pass"] = self.passes
        if size is None or size[0] * size[1] != num_tokens:
            raise ValueError(
                f"x: the size of the map behind these {num_tokens} tokens is unknown; a routed block runs once for each "
                f"pass through the model's patch embedding (the last one made {self.size}), not on its own, and is "
                "checkpointed with use_reentrant=False"
            )
        return size


class BlockMarker:
    """A forward pre-hook of a block."""

    def __init__(self, tracker: GridTracker):
        self.tracker = tracker

    def __call__(self, block: nn.Module, args) -> None:
        if torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
        if not _in_backward():
            setattr(x, _MARK, self.tracker.size)
        elif hasattr(x, _MARK):
            self.tracker.recomputed = getattr(x, _MARK)
        elif x.grad_fn is None:  # a detached copy starts here, not the output of the block before
            self.tracker.recomputed = None
