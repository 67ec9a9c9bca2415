"""The kernels of ``triton.py``: what a program does with its rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "Q"])
def gather_normalize_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    N,
    Q,
    C,
    stride_xb,
    stride_xn,
    stride_xc,
    eps,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A block of a sample's Q rows a program. ``WHOLE``: BLOCK_C covers C, and rows stay in
    registers."""
    blocks = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    q = (program % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    index = tl.load(index_ptr + b * Q + q, mask=q < Q, other=0)
    known = (index >= 0) & (index < N)
    inside = (q < Q) & known
    x_ptr += b * stride_xb + index[:, None] * stride_xn
    out_ptr += (b * Q + q[:, None]) * C

    if WHOLE:
        x = tl.load(
            x_ptr + c[None, :] * stride_xc, mask=inside[:, None] & (c < C)[None, :], other=0.0
        ).to(tl.float32)
        square = tl.sum(x * x, 1)
    else:
        square = tl.zeros([BLOCK_Q], tl.float32)
        for start in range(0, C, BLOCK_C):
            at = start + c
            x = tl.load(
                x_ptr + at[None, :] * stride_xc, mask=inside[:, None] & (at < C)[None, :], other=0.0
            )
            square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    # nothing lies at an index out of range: NaN, where plain torch raises, and no read beyond the
    # map
    scale = tl.where(known, 1.0 / tl.sqrt_rn(square / C + eps), float("nan"))
    tl.store(scale_ptr + b * Q + q, scale, mask=q < Q)

    if WHOLE:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        y = x * scale[:, None] * weight[None, :]
        tl.store(
            out_ptr + c[None, :],
            y.to(out_ptr.dtype.element_ty),
            mask=(q < Q)[:, None] & (c < C)[None, :],
        )
    else:
        for start in range(0, C, BLOCK_C):  # rows come from the cache
            at = start + c
            x = tl.load(
                x_ptr + at[None, :] * stride_xc, mask=inside[:, None] & (at < C)[None, :], other=0.0
            )
            weight = tl.load(weight_ptr + at, mask=at < C, other=0.0).to(tl.float32)
            y = x.to(tl.float32) * scale[:, None] * weight[None, :]
            tl.store(
                out_ptr + at[None, :],
                y.to(out_ptr.dtype.element_ty),
                mask=(q < Q)[:, None] & (at < C)[None, :],
            )


@triton.jit(do_not_specialize=["N", "K", "R", "route"])
def gather_normalize_backward_kernel(
    grad_ptr,
    x_ptr,
    index_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    N,
    K,
    R,
    route,
    C,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_gb,
    stride_gn,
    stride_gc,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FIRST: tl.constexpr,
    WITH_X: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
):
    """A block of the K rows of one route a program. ``FIRST``: the map of gradients is still
    zero."""
    blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    k = (program % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = (b * R + route) * K + k
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    index = tl.load(index_ptr + slot, mask=k < K, other=0)
    inside = (k < K) & (index >= 0) & (index < N)
    scale = tl.load(scale_ptr + slot, mask=inside, other=0.0)
    x_ptr += b * stride_xb + index[:, None] * stride_xn
    if WITH_X:
        grad_x_ptr += b * stride_gb + index[:, None] * stride_gn
    grad_ptr += slot[:, None] * C

    # the norm's part of the gradient
    radial = tl.zeros([BLOCK_K], tl.float32)
    if WITH_X:
        for start in range(0, C, BLOCK_C):
            at = start + c
            mask = inside[:, None] & (at < C)[None, :]
            x = tl.load(x_ptr + at[None, :] * stride_xc, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at[None, :], mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + at, mask=at < C, other=0.0).to(tl.float32)
            radial += tl.sum(grad * weight[None, :] * x, 1)
        radial = radial * scale / C

    # the gradients, a block of channels at a time
    for start in range(0, C, BLOCK_C):  # rows come from the cache
        at = start + c
        mask = inside[:, None] & (at < C)[None, :]
        x = tl.load(x_ptr + at[None, :] * stride_xc, mask=mask, other=0.0).to(tl.float32)
        unit = x * scale[:, None]
        grad = tl.load(grad_ptr + at[None, :], mask=mask, other=0.0).to(tl.float32)
        if WITH_WEIGHT:
            at_partial = (program * R + route) * C + at
            tl.store(partial_ptr + at_partial, tl.sum(grad * unit, 0), mask=at < C)
        if WITH_X:
            weight = tl.load(weight_ptr + at, mask=at < C, other=0.0).to(tl.float32)
            grad_x = scale[:, None] * (grad * weight[None, :] - unit * radial[:, None])
            place = grad_x_ptr + at[None, :] * stride_gc
            if not FIRST:
                grad_x += tl.load(place, mask=mask, other=0.0).to(tl.float32)
            tl.store(place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
