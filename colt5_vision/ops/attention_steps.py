"""What the Triton kernels of every attention share: rows, and a step of softmax and gradients.

Strides come in units of ALIGN elements, so that the compiler sees that rows can be read 16 bytes at
a time.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PAD = tl.constexpr(128)  # a multiple of every BLOCK_N

# names of arguments that change with the image
STRIDES = tuple(
    f"{name}_{step}"
    for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")
    for step in ("batch", "head", "token")
)


@triton.jit
def head_of(base, b, h, batch_stride, head_stride, ALIGN: tl.constexpr):
    return base + (b.to(tl.int64) * batch_stride + h.to(tl.int64) * head_stride) * ALIGN


@triton.jit
def load_rows(
    base, index, valid, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """(len(index), BLOCK_D); zeros where not valid. The stride is in units of ALIGN elements."""
    d = tl.arange(0, BLOCK_D)
    at = base + (index.to(tl.int64) * stride * ALIGN)[:, None] + d[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(at, mask=valid[:, None], other=0.0)
    else:
        return tl.load(at, mask=valid[:, None] & (d[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def store_rows(
    base,
    x,
    index,
    valid,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    at = base + (index.to(tl.int64) * stride * ALIGN)[:, None] + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=valid[:, None] & (d[None, :] < HEAD_DIM))


@triton.jit
def padded(listed):
    """Length of a row of list_keys and its like."""
    return tl.cdiv(listed, PAD) * PAD


@triton.jit
def load_list_rows(rows, first, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """A block of list_k or list_v: (BLOCK, BLOCK_D). No mask of keys, by far the most that such a
    load costs."""
    d = tl.arange(0, BLOCK_D)
    at = rows + first * HEAD_DIM + (tl.arange(0, BLOCK)[:, None] * HEAD_DIM + d[None, :])
    if HEAD_DIM == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=d[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def softmax_step(q, k, v, bias, m, total, acc, scale2):
    """Take keys and values (S, D) into an online softmax in base 2; a bias of -inf leaves out."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 + bias[None, :]
    highest = tl.maximum(m, tl.max(logits, 1))
    origin = tl.where(highest == float("-inf"), 0.0, highest)  # no key so far: no NaN
    weights = tl.exp2(logits - origin[:, None])
    fade = tl.exp2(m - origin)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit
def query_step(query, grad, k, v, bias, lse2, delta, acc, scale2):
    """Add to the gradient of the queries what keys and values (S, D) give; unscaled. A bias of
    -inf leaves out."""
    logits = tl.dot(query, tl.trans(k), input_precision="ieee") * scale2 + bias[None, :]
    weights = tl.exp2(logits - lse2[:, None])
    grad_logits = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(grad_logits.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def key_step(query, grad, k, v, bias, seen, lse2, delta, grad_k, grad_v, grad_bias, scale2):
    """Add to the gradients of keys and values (S, D) and biases what queries (L, D) give; keys
    unscaled."""
    logits = tl.dot(k, tl.trans(query), input_precision="ieee") * scale2 + bias[:, None]
    weights = tl.where(seen, tl.exp2(logits - lse2[None, :]), 0.0)
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision="ieee")
    grad_logits = weights * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
    grad_logits = tl.where(seen, grad_logits, 0.0)  # of a NaN that this query does not see: none
    grad_k = tl.dot(grad_logits.to(query.dtype), query, grad_k, input_precision="ieee")
    return grad_k, grad_v, grad_bias + tl.sum(grad_logits, 1)
