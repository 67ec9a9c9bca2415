"""Positions without tables: rotary embeddings of lines and maps, and orders of a map for the
untrained routers."""

import torch
from torch import Tensor

from .ops.dtypes import wide_dtype


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of the features (..., 2 * half) by ``angle`` (..., half), in its
    dtype."""
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(angle.dtype).unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def rotary(x: Tensor, position: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotate the features by the place of their token in a sequence: pairs (i, i + head_dim / 2),
    all of head_dim.

    Args:
        x: (..., N, head_dim), head_dim even.
        position: of the tokens, an integer tensor that broadcasts to (..., N).
        theta: base of the wavelengths, 2π to 2π·theta tokens.

    Returns:
        Same shape and dtype; the product of a rotated query and a rotated key depends on their
        offset only.

    Raises:
        ValueError: if head_dim is not even.

    Source: RoFormer (arXiv 2104.09864).
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"rotary_emb: head_dim must be even, got {head_dim}")
    half = head_dim // 2
    wide = wide_dtype(x)
    freq = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    return _turn(x, position.to(wide).unsqueeze(-1) * freq)


def rows_and_columns(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of integer places in a map of this width."""
    rows = places // width
    return rows, places - rows * width  # ONNX has no remainder by an open size


def axial_rotary(x: Tensor, y_x: tuple[Tensor, Tensor], theta: float = 100.0) -> Tensor:
    """Rotate the first half of the features by the row and the second by the column of their token.

    Args:
        x: (..., N, head_dim), head_dim divisible by 4.
        y_x: rows and columns of the tokens, integer tensors that broadcast to (..., N).
        theta: base of the wavelengths, 2π to 2π·theta tokens.

    Returns:
        Same shape and dtype; the product of a rotated query and a rotated key depends on their
        offset only.

    Raises:
        ValueError: if head_dim is not divisible by 4.

    Source: RoFormer (arXiv 2104.09864), axial form as in EVA-02 (arXiv 2303.11331).
    """
    head_dim = x.shape[-1]
    if head_dim % 4:
        raise ValueError(f"rotary_emb: head_dim must be divisible by 4, got {head_dim}")
    quarter = head_dim // 4
    wide = wide_dtype(x)
    freq = theta ** (-torch.arange(quarter, device=x.device, dtype=wide) / quarter)
    angle = torch.stack(
        [position.to(wide).unsqueeze(-1) * freq for position in y_x], -2
    )  # (..., N, 2, quarter)
    return _turn(x.unflatten(-1, (2, 2 * quarter)), angle).flatten(-2)


def sincos_2d(height: int, width: int, dim: int, device) -> Tensor:
    """(H, W, dim) float32, sines and cosines of column and row, ``dim`` divisible by 4.

    Source: simple ViT (arXiv 2205.01580).
    """
    quarter = dim // 4
    steps = torch.arange(quarter, device=device, dtype=torch.float32)
    freq = 10000.0 ** (-steps / max(1, quarter - 1))
    rows = torch.arange(height, device=device).view(-1, 1, 1) * freq
    columns = torch.arange(width, device=device).view(1, -1, 1) * freq
    parts = [
        angle.expand(height, width, quarter)
        for angle in (columns.sin(), columns.cos(), rows.sin(), rows.cos())
    ]
    return torch.cat(parts, -1)


def dispersed_rank(height: int, width: int, device, offset: int = 0) -> Tensor:
    """(N,) rank of each token in an order whose every prefix is spread evenly over the map
    (ordered-dither matrix).

    The first quarter is the map strided by 2, the first sixteenth strided by 4, anything between
    nests in between.
    """
    y = (torch.arange(height, device=device) + offset).unsqueeze(1)
    x = (torch.arange(width, device=device) + offset).unsqueeze(0)
    rank = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(16):  # maps up to 65536 on a side
        rank = rank * 4 + ((x ^ y) & 1) * 2 + (y & 1)
        y, x = y >> 1, x >> 1
    return rank.reshape(-1)


def morton_order(height: int, width: int, device) -> Tensor:
    """(N,) raster indices along a Z-order curve: neighbours in the order are mostly neighbours in
    the map."""

    def spread(side: int) -> Tensor:  # bit i to bit 2 i
        place = torch.arange(side, device=device)
        # maps up to 65536 on a side
        bits = [((place >> bit) & 1) << (2 * bit) for bit in range(16)]
        return torch.stack(bits).sum(0)

    return (2 * spread(height).unsqueeze(1) + spread(width)).reshape(-1).argsort()


def hashed_uniform(num: int, seed: int, device) -> Tensor:
    """(num,) numbers in [0, 1) that look random and depend on position and ``seed`` only (a
    multiplicative hash)."""
    x = torch.arange(num, device=device) + 1 + seed * 0x3C6EF372
    for factor in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 16)) & 0xFFFFFFFF) * factor & 0xFFFFFFFF
    return (x ^ (x >> 16)).to(torch.float32) / 2**32


def fixed_scores(kind: str, height: int, width: int, rows: range, device) -> Tensor:
    """(len(rows), N) float32 scores of a map's tokens that hang on no content, a row a route.

    Args:
        kind: ``"random"``, numbers that look random; ``"grid"``, whose largest are spread evenly.
        rows: numbers of the routes; another number gives another choice.
    """
    if kind == "random":
        scores = [hashed_uniform(height * width, row, device) for row in rows]
    else:
        # exact in float32 up to 4096 x 4096 tokens
        scores = [-dispersed_rank(height, width, device, row).float() for row in rows]
    return torch.stack(scores)
