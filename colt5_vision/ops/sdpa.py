"""One part of an attention, with its logsumexp: SDPA's fused kernels, and plain torch where there
is none. And SDPA itself, which forward-mode AD can take.

A row over all keys can be put together from parts: out = sum_p exp(lse_p - lse) out_p. Its backward
is each part's own backward called with the *global* out and logsumexp, as in ring attention. The
public SDPA returns no logsumexp, so the kernels behind it are called directly.
"""

import torch
from torch import Tensor, nn

from .._torch_internals import efficient as _efficient
from .._torch_internals import efficient_backward as _efficient_backward
from .._torch_internals import flash_cpu as _flash_cpu
from .._torch_internals import flash_cpu_backward as _flash_cpu_backward
from .._torch_internals import has_tangent
from .._torch_internals import plain_attention as _plain
from .dtypes import wide_dtype

_PLAIN_LOGITS = 1 << 25  # logits held at once by the plain path


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's, by its plain path under forward-mode AD, which its fused kernels refuse.

    Called directly: ``sdpa_kernel`` switches flags of the whole process, other threads' too.
    """
    how = {"scale": scale, "enable_gqa": enable_gqa}
    if not has_tangent(query, key, value):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **how
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
            ~attn_mask, -torch.inf
        )
    return _plain(query, key, value, attn_mask, dropout_p, is_causal, None, **how)[0]


def masked_logit(query: Tensor) -> float:
    """The bias of a key that must not be read: finite, so that a part without any key stays free of
    NaN.

    The CPU and the plain path take a float32 bias whatever the query; the CUDA kernel wants the
    query's dtype.
    """
    return -3e4 if query.dtype == torch.float16 and query.device.type == "cuda" else -1e30


def _has_efficient(query: Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and query.shape[-1] % 8 == 0
        and query.numel() > 0
    )


def _dense_rows(*tensors: Tensor) -> list[Tensor]:
    """The fused kernels take a head's features to lie side by side, and do not look."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _aligned(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """``bias`` as the memory-efficient kernel wants it: the query's dtype, rows of 16 elements,
    expanded."""
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if bias is None:
        bias = query.new_zeros(1, 1, 1, key.shape[2])
    bias = torch.nn.functional.pad(bias.to(query.dtype), (0, -key.shape[2] % 16))
    return bias[..., : key.shape[2]].expand(shape)


def _logits(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = (query @ key.mT) * scale
    return logits if bias is None else logits + bias


def _rows(bias: Tensor | None, rows: slice) -> Tensor | None:
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]


def _query_chunks(query: Tensor, key: Tensor) -> list[slice]:
    batch, heads, length, _ = query.shape
    step = max(1, _PLAIN_LOGITS // max(1, batch * heads * key.shape[2]))
    return [slice(start, start + step) for start in range(0, length, step)]


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its logsumexp.

    Args:
        query, key, value: (B, heads, L, D), (B, heads, S, D), (B, heads, S, D) with S >= 1.
        bias: (B or 1, heads or 1, L or 1, S) added to the logits, in float32 or the query's dtype;
            None for none.
        scale: factor of the logits.

    Returns:
        out (B, heads, L, D) and lse (B, heads, L), float32 (float64 for float64).
    """
    if query.numel() == 0:
        wide = wide_dtype(query)
        return torch.zeros_like(query), query.new_zeros(query.shape[:-1], dtype=wide)
    query, key, value = _dense_rows(query, key, value)
    if query.device.type == "cpu":
        return _flash_cpu(query, key, value, attn_mask=bias, scale=scale)
    if _has_efficient(query):
        bias = _aligned(bias, query, key)
        out, lse, _, _ = _efficient(query, key, value, bias, True, scale=scale)
        return out, lse[..., : query.shape[2]]
    outs, lses = [], []
    wide = wide_dtype(query)
    for rows in _query_chunks(query, key):
        logits = _logits(query[:, :, rows].to(wide), key.to(wide), _rows(bias, rows), scale)
        lses.append(logits.logsumexp(-1))
        outs.append((logits - lses[-1].unsqueeze(-1)).exp().to(value.dtype) @ value)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value of one part, given the *global* ``out`` and ``lse`` (+inf:
    the row is off)."""
    if query.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

    # fused, where torch has it
    grad, query, key, value, out = _dense_rows(grad, query, key, value, out)
    if query.device.type == "cpu":
        return _flash_cpu_backward(
            grad, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    if _has_efficient(query):
        bias = _aligned(bias, query, key)
        if torch.version.hip is None:  # the CUDA kernel wants its logsumexp rows padded to 32
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        seed = torch.zeros((), dtype=torch.int64, device=query.device)  # no dropout: never read
        need = [True, True, True, False]
        return _efficient_backward(
            grad, query, key, value, bias, out, lse.contiguous(), seed, seed, 0.0, need, scale=scale
        )[:3]

    # else chunk by chunk, from the logsumexp
    wide = wide_dtype(query)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    for rows in _query_chunks(query, key):
        q, g = query[:, :, rows].to(wide), grad[:, :, rows].to(wide)
        weights = (
            _logits(q, key.to(wide), _rows(bias, rows), scale) - lse[:, :, rows].unsqueeze(-1)
        ).exp()
        grad_value += weights.mT @ g
        grad_logits = weights * (g @ value.to(wide).mT - delta[:, :, rows])
        grad_query[:, :, rows] = (grad_logits @ key.to(wide)) * scale
        grad_key += (grad_logits.mT @ q) * scale
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
