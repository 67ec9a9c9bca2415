"""The kernels of ``triton.py``: what a program does with its rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "K"])
def join_kernel(
    out_ptr,
    rows_ptr,
    index_ptr,
    gates_ptr,
    null_ptr,
    N,
    K,
    C,
    stride_ob,
    stride_on,
    stride_oc,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of a sample's K rows and one of channels a program. No null token: 0."""
    blocks, parts = tl.cdiv(K, BLOCK_K), tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts  # row: the sample and its block of rows
    b = row // blocks
    k = (row % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.load(index_ptr + b * K + k, mask=k < K, other=0)
    inside = (k < K) & (index >= 0) & (index < N)
    mask = inside[:, None] & (c < C)[None, :]
    add = tl.load(rows_ptr + (b * K + k[:, None]) * C + c[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    add *= tl.load(gates_ptr + b * K + k, mask=inside, other=0.0).to(tl.float32)[:, None]
    if null_ptr is not None:
        add -= tl.load(null_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + b * stride_ob + index[:, None] * stride_on + c[None, :] * stride_oc
    add += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, add.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "K"])
def join_backward_kernel(
    grad_ptr,
    rows_ptr,
    index_ptr,
    gates_ptr,
    grad_rows_ptr,
    grad_gates_ptr,
    partial_ptr,
    N,
    K,
    C,
    stride_gb,
    stride_gn,
    stride_gc,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of a sample's K rows a program; ``partial_ptr`` gets the null token's gradient of
    each."""
    blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    k = (program % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = b * K + k
    c = tl.arange(0, BLOCK_C).to(tl.int64)

    # which rows of the map
    index = tl.load(index_ptr + slot, mask=k < K, other=0)
    inside = (k < K) & (index >= 0) & (index < N)
    grad_ptr += b * stride_gb + index[:, None] * stride_gn
    grad_gate = tl.zeros([BLOCK_K], tl.float32)

    # a block of channels at a time
    for start in range(0, C, BLOCK_C):
        at = start + c
        mask = (k < K)[:, None] & (at < C)[None, :]
        grad = tl.load(
            grad_ptr + at[None, :] * stride_gc, mask=inside[:, None] & mask, other=0.0
        ).to(tl.float32)
        if partial_ptr is not None:
            tl.store(partial_ptr + program * C + at, -tl.sum(grad, 0), mask=at < C)
        rows = tl.load(
            rows_ptr + slot[:, None] * C + at[None, :], mask=inside[:, None] & mask, other=0.0
        ).to(tl.float32)
        grad_gate += tl.sum(grad * rows, 1)
        gates = tl.load(gates_ptr + slot, mask=k < K, other=0.0).to(tl.float32)
        place = grad_rows_ptr + slot[:, None] * C + at[None, :]
        tl.store(place, (grad * gates[:, None]).to(grad_rows_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_gates_ptr + slot, grad_gate.to(grad_gates_ptr.dtype.element_ty), mask=k < K)
