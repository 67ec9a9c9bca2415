"""Other ways to make a pretrained ViT's attention cheaper at the same number of keys, for
comparison.

Each replaces ``scaled_dot_product_attention`` over P prefix tokens and a map; queries are all kept.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def _strided(grid_size: tuple[int, int], stride: int, offset: int | None = None) -> Tensor:
    (height, width), start = grid_size, stride // 2 if offset is None else offset
    rows, columns = torch.arange(start, height, stride), torch.arange(start, width, stride)
    return (rows.unsqueeze(1) * width + columns).flatten()


def subsampled_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_size: tuple[int, int],
    prefix: int,
    share: float,
    offset: int | None = None,
) -> Tensor:
    """ToDo (arXiv 2402.13573): keys and values of every n-th row and column only, from ``offset``
    on (ToDo's own is 0, by default the middle)."""
    kept = torch.cat(
        [torch.arange(prefix), _strided(grid_size, round(share**-0.5), offset) + prefix]
    )
    return scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept])


def merged_keys(
    q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], prefix: int, share: float
) -> Tensor:
    """ToMe-style (arXiv 2210.09461, 2303.17604): each key is averaged into the most similar key of
    a strided grid, and a merged key weighs as many as it stands for (proportional attention)."""
    target = _strided(grid_size, round(share**-0.5))
    image_k, image_v = k[:, :, prefix:], v[:, :, prefix:]
    metric = torch.nn.functional.normalize(
        image_k.mean(1), dim=-1
    )  # (B, N, D), as ToMe: keys averaged over heads
    nearest = (metric @ metric[:, target].mT).argmax(-1)
    nearest[:, target] = torch.arange(len(target))
    index = nearest[:, None, :, None].expand_as(image_k)
    size = torch.zeros(k.shape[0], len(target)).scatter_add(1, nearest, torch.ones(nearest.shape))

    def merge(x: Tensor) -> Tensor:
        merged = x.new_zeros(*x.shape[:2], len(target), x.shape[-1]).scatter_add(2, index, x)
        return merged / size[:, None, :, None]

    keys = torch.cat([k[:, :, :prefix], merge(image_k)], 2)
    values = torch.cat([v[:, :, :prefix], merge(image_v)], 2)
    weight = torch.nn.functional.pad(size.log(), (prefix, 0))[:, None, None].to(q.dtype)
    return scaled_dot_product_attention(q, keys, values, attn_mask=weight)


class ReplaceAttention(TorchFunctionMode):
    """Within it, ``attend(q, k, v, grid_size, prefix, share)`` stands for scaled dot-product
    attention."""

    def __init__(self, attend, grid_size: tuple[int, int], prefix: int, share: float):
        super().__init__()
        self.attend, self.rest = attend, (grid_size, prefix, share)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            return self.attend(*args[:3], *self.rest)
        return func(*args, **(kwargs or {}))
