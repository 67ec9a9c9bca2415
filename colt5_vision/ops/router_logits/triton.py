"""Logits of the learned router as Triton kernels: one read of the map for all routes, forward and
backward.

Any strides of ``x`` are taken as they come, so that the (B, C, H, W) map of a convolutional network
is read where it lies: a copy of it would cost more than the operator. Sums over tokens are written
once per program and added by torch: no atomics, the same result in every run. Sizes are left to
Triton's own specialisation, on 1 and on multiples of 16: a channels-first map is contiguous in its
tokens, and only a known N vectorises those loads; three variants at most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend

TILE = 4096  # elements of x that a program holds


@triton.jit
def router_logits_kernel(
    x_ptr,
    tokens_ptr,
    logits_ptr,
    norm_ptr,
    N,
    C,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_tb,
    eps,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A block of tokens a program, its channels in turn."""
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    n = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    route = tl.arange(0, BLOCK_R)
    square = tl.zeros([BLOCK_N], tl.float32)
    dots = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        at = b * stride_xb + n[:, None] * stride_xn + c[None, :] * stride_xc
        x = tl.load(x_ptr + at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(x * x, 1)
        for r in range(R):
            token = tl.load(tokens_ptr + b * stride_tb + r * C + c, mask=c < C, other=0.0)
            dots += tl.where(route[None, :] == r, tl.sum(x * token[None, :], 1)[:, None], 0.0)
    norm = tl.maximum(tl.sqrt_rn(square), eps)
    tl.store(norm_ptr + b * N + n, norm, mask=inside)
    at = (b * R + route[None, :]) * N + n[:, None]
    tl.store(logits_ptr + at, dots / norm[:, None], mask=inside[:, None] & (route < R)[None, :])


@triton.jit
def router_logits_backward_kernel(
    grad_ptr,
    x_ptr,
    tokens_ptr,
    logits_ptr,
    norm_ptr,
    grad_x_ptr,
    partial_ptr,
    N,
    C,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_tb,
    stride_gb,
    stride_gn,
    stride_gc,
    eps,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WITH_X: tl.constexpr,
    WITH_TOKENS: tl.constexpr,
):
    """A block of tokens and one of channels a program: given logits and norms, channels are
    independent."""
    blocks, parts = tl.cdiv(N, BLOCK_N), tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts  # row: the sample and its block of tokens
    b = row // blocks
    n = (row % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = n < N
    mask = inside[:, None] & (c < C)[None, :]

    x = tl.load(
        x_ptr + b * stride_xb + n[:, None] * stride_xn + c[None, :] * stride_xc,
        mask=mask,
        other=0.0,
    )
    x = x.to(tl.float32)
    norm = tl.load(norm_ptr + b * N + n, mask=inside, other=1.0)

    # the norm's part of the gradient of x
    if WITH_X:
        radial = tl.zeros([BLOCK_N], tl.float32)
        for r in range(R):
            at = (b * R + r) * N + n
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
            radial += grad * tl.load(logits_ptr + at, mask=inside, other=0.0)
        # the sum starts from x and not from zeros, which would lie in registers differently
        grad_x = x * tl.where(norm > eps, -radial / (norm * norm), 0.0)[:, None]

    # each route's part, and the token's own
    for r in range(R):
        scaled = tl.load(grad_ptr + (b * R + r) * N + n, mask=inside, other=0.0) / norm
        if WITH_X:
            token = tl.load(tokens_ptr + b * stride_tb + r * C + c, mask=c < C, other=0.0)
            grad_x += scaled[:, None] * token[None, :]
        if WITH_TOKENS:
            tl.store(
                partial_ptr + (row * R + r) * C + c, tl.sum(scaled[:, None] * x, 0), mask=c < C
            )
    if WITH_X:
        grad_x_ptr += b * stride_gb + n[:, None] * stride_gn + c[None, :] * stride_gc
        tl.store(grad_x_ptr, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _token_stride(tokens: Tensor) -> int:
    return tokens.stride(0) if tokens.ndim == 3 else 0


def forward(x: Tensor, tokens: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``eager.forward``; ``tokens`` in float32."""
    batch, num_tokens, dim = x.shape
    tokens = tokens.contiguous()
    routes = tokens.shape[-2]
    logits = tokens.new_empty(batch, routes, num_tokens)
    norm = tokens.new_empty(batch, num_tokens)

    # at least 16 tokens a program: those of a channels-first map are neighbours in memory, 16 of
    # them a sector
    block_c = min(triton.next_power_of_2(dim), 256)
    block_n = min(128, max(16, TILE // block_c))

    # logits, and the norms for backward
    backend.launch(
        router_logits_kernel,
        (batch * triton.cdiv(num_tokens, block_n),),
        x,
        tokens,
        logits,
        norm,
        num_tokens,
        dim,
        *x.stride(),
        _token_stride(tokens),
        eps,
        R=routes,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_R=triton.next_power_of_2(routes),
        num_warps=max(4, block_n * block_c // 512),
        **backend.no_spills(x.device),
    )
    return logits, norm


def backward(
    grad: Tensor,
    x: Tensor,
    tokens: Tensor,
    logits: Tensor,
    norm: Tensor,
    eps: float,
    with_x: bool = True,
    with_tokens: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """As ``eager.backward``; None for what is not asked for."""
    batch, num_tokens, dim = x.shape
    tokens = tokens.contiguous()
    routes = tokens.shape[-2]

    # a block of tokens and channels a program
    block_c = min(triton.next_power_of_2(dim), 64)
    block_n = 64
    blocks = triton.cdiv(num_tokens, block_n)

    # what is written; of the routing tokens each block's part
    grad_x = torch.empty_like(x) if with_x else None
    partial = tokens.new_empty(batch, blocks, routes, dim) if with_tokens else None

    # both gradients from one reading of x
    backend.launch(
        router_logits_backward_kernel,
        (batch * blocks * triton.cdiv(dim, block_c),),
        grad.contiguous(),
        x,
        tokens,
        logits,
        norm,
        grad_x,
        partial,
        num_tokens,
        dim,
        *x.stride(),
        _token_stride(tokens),
        *(grad_x.stride() if with_x else (0, 0, 0)),
        eps,
        R=routes,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        WITH_X=with_x,
        WITH_TOKENS=with_tokens,
        num_warps=8,
        **backend.no_spills(x.device),
    )

    # the parts of all blocks, and of all samples where they share the routing tokens
    return grad_x, partial.sum((1,) if tokens.ndim == 3 else (0, 1)) if with_tokens else None
