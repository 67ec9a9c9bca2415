"""The size of the map of the forward in progress, told by a patch embedding to the attention modules behind it."""

import torch
from torch import nn


class GridTracker:
    """A forward hook of a patch embedding; ``size_for`` gives the (H, W) it saw, never that of an earlier forward.

    One pass through the patch embedding serves each attention module once. Recomputation of a checkpointed block in
    backward gets the size of its own forward: the only one of that many tokens seen since the last backward.
    """

    def __init__(self):
        self.size: tuple[int, int] | None = None
        self.passes = 0
        self.in_flight: set[tuple[int, int]] = set()
        self.recomputed = False

    def __call__(self, patch_embed: nn.Module, args, output) -> None:
        if isinstance(output, tuple):  # timm's ...WithSize return the size as well
            self.size = tuple(output[1])
        elif output.ndim == 4:
            nchw = str(getattr(patch_embed, "output_fmt", "NCHW")).endswith("NCHW")
            self.size = tuple(output.shape[2:]) if nchw else tuple(output.shape[1:3])
        else:
            self.size = tuple(patch_embed.dynamic_feat_size(args[0].shape[-2:]))
        if torch.compiler.is_compiling():
            return  # one trace is one forward: nothing can be stale within it
        self.passes += 1
        if torch.is_grad_enabled():
            if self.recomputed:
                self.in_flight.clear()
                self.recomputed = False
            self.in_flight.add(self.size)

    def size_for(self, attention: nn.Module, num_tokens: int) -> tuple[int, int]:
        """(H, W) of the map whose ``num_tokens`` tokens reached ``attention``.

        Raises:
            ValueError: if no pass through the patch embedding belongs to them.
        """
        if torch.compiler.is_compiling():
            size = self.size
        elif torch._C._current_graph_task_id() != -1:  # within backward: a checkpointed block runs again
            self.recomputed = True
            sizes = [size for size in self.in_flight if size[0] * size[1] == num_tokens]
            if len(sizes) > 1:
                raise ValueError(
                    f"x: {num_tokens} tokens of a checkpointed block may be any of {sorted(sizes)}, the sizes of the "
                    "forwards since the last backward; call backward between them"
                )
            size = sizes[0] if sizes else None
        else:
            size = None if attention.__dict__.get("served_pass") == self.passes else self.size
            attention.__dict__["served_pass"] = self.passes
        if size is None or size[0] * size[1] != num_tokens:
            raise ValueError(
                f"x: the size of the map behind these {num_tokens} tokens is unknown; a routed block runs once for each "
                f"pass through the model's patch embedding (the last one made {self.size}), not on its own"
            )
        return size
