"""Attention of groups of queries to their own keys by Triton: the launches. The kernels are in
``kernels.py``."""

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .. import backend
from ..attention_steps import PAD
from ..attention_tiles import dense_rows, options_for, outer_strides
from .call import Call, blank_masked, prefix_backward, prefix_forward
from .kernels import (
    backward_list_kernel,
    backward_query_kernel,
    forward_kernel,
    gather_kernel,
    sum_kernel,
)

_HELD = 1 << 26  # elements of keys that are copied at once
_GATHER_BLOCK = 64
_SUM_TILE = 2048  # elements of a map that a program of the sum holds


class _Part:
    """Some groups of a call, their keys copied one after the other (see ``kernels.py``)."""

    def __init__(self, call: Call, some: slice, others: tuple[Tensor, ...] = ()):
        batch, heads, length, self.head_dim = call.q.shape
        # 8 halves are 16 bytes
        self.align = math.gcd(8, self.head_dim, *outer_strides(call.q, call.k, call.v, *others))

        # indices and what is added to the logits, of these groups
        self.queries, self.keys, *further = (
            None if x is None else x[:, :, some].contiguous()
            for x in (call.groups, call.keys, *call.further)
        )

        # sizes
        routes, self.groups, self.num_keys = self.keys.shape[1:]
        self.pairs, self.size = batch * heads, self.queries.shape[3]
        self.listed = _listed(call)
        self.tokens, self.prefix = length - call.prefix, call.prefix
        self.shared = [heads, heads // routes, self.groups]

        # the lists
        shape = (batch, heads, self.groups, triton.cdiv(self.listed, PAD.value) * PAD.value)
        self.list_k, self.list_v = (x.new_empty(*shape, self.head_dim) for x in (call.k, call.v))
        self.list_biases = call.q.new_empty(shape, dtype=torch.float32)
        tiles = shape[3] // _GATHER_BLOCK
        backend.launch(
            gather_kernel, self.grid(tiles), call.k, call.v, self.keys, *further, call.key_mask,
            *self.lists(), *self.strides(call.k, call.v), *self.shared, self.tokens, self.prefix,
            self.num_keys, self.listed, tiles, BLOCK=_GATHER_BLOCK, **self.flags(),
        )  # fmt: skip

    def lists(self) -> list[Tensor]:
        return [self.list_k, self.list_v, self.list_biases]

    def sizes(self, tiles: int) -> list[int]:
        """heads ... tiles, as the kernels over queries take them."""
        return [*self.shared, self.size, self.tokens, self.prefix, self.listed, tiles]

    def flags(self) -> dict[str, int]:
        """The compile-time arguments: the width of a head, and what divides all strides."""
        block = max(16, triton.next_power_of_2(self.head_dim))
        return {"HEAD_DIM": self.head_dim, "BLOCK_D": block, "ALIGN": self.align}

    def strides(self, *tensors: Tensor) -> list[int]:
        """Of (B, heads, L, D), those of all but D, in units of ``align``."""
        return [stride // self.align for stride in outer_strides(*tensors)]

    def grid(self, tiles: int) -> tuple[int]:
        return (self.pairs * self.groups * tiles,)

    def places(self) -> tuple[Tensor, Tensor]:
        """Where each token is listed, as the sum takes it: places and their starts."""
        there = (self.keys >= 0) & (self.keys < self.tokens)
        token = torch.where(there, self.keys, self.tokens).flatten(0, 1).flatten(1)
        token, places = token.sort(dim=-1, stable=True)
        every = torch.arange(self.tokens + 1, device=token.device).expand(token.shape[0], -1)
        return places, torch.searchsorted(token, every.contiguous(), out_int32=True)


def _listed(call: Call) -> int:
    """Keys of a group, prefix and pooled ones with them."""
    pooled = 0 if call.log_mass is None else call.log_mass.shape[3]
    return call.prefix + call.keys.shape[3] + pooled


def _slices(call: Call) -> list[slice]:
    """The groups, as many at a time as may be held at once."""
    batch, heads, length, head_dim = call.q.shape
    each = batch * heads * _listed(call) * head_dim
    if not each or length == call.prefix:
        return []
    step = max(1, _HELD // each)
    return [slice(start, start + step) for start in range(0, call.groups.shape[2], step)]


def _dense(call: Call) -> Call:
    """As the kernels take it."""
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    q, k, v = (dense_rows(x) for x in (call.q, call.k, call.v))
    return call._replace(q=q, k=k, v=v, key_mask=mask)


def _zeros(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of the shape of ``x`` (B, heads, L, D), (B, L, heads, D) in memory."""
    shape = (x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    return x.new_zeros(shape, dtype=dtype).transpose(1, 2)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """As ``eager.forward``."""
    call = _dense(call)
    q, prefix = call.q, call.prefix
    out = _zeros(q)
    lse = q.new_full(q.shape[:3], math.inf, dtype=torch.float32)

    # the groups, a few at a time
    for some in _slices(call):
        part = _Part(call, some)
        options = options_for("forward", q, part.size, part.listed)
        tiles = triton.cdiv(part.size, options["BLOCK_M"])
        backend.launch(
            forward_kernel, part.grid(tiles), q, out, lse, part.queries, *part.lists(),
            *part.strides(q, out), call.scale / math.log(2), *part.sizes(tiles),
            **part.flags(), **options,
        )  # fmt: skip

    # the prefix, to everything
    if prefix:
        out[:, :, :prefix], lse[:, :, :prefix] = prefix_forward(blank_masked(call))
    return out, lse


def backward(grad: Tensor, out: Tensor, lse: Tensor, call: Call) -> tuple[Tensor | None, ...]:
    """As ``eager.backward``."""
    call, grad, out, lse = _dense(call), dense_rows(grad), dense_rows(out), lse.contiguous()
    q, prefix = call.q, call.prefix
    slices = _slices(call)

    # sums of several parts are float32
    dtype = torch.float32 if len(slices) > 1 else q.dtype
    grad_q, grad_k, grad_v = _zeros(q), _zeros(call.k, dtype), _zeros(call.v, dtype)
    further = [None if x is None else torch.zeros_like(x) for x in call.further]

    # the prefix, which reads everything
    if prefix:
        dq, dk, dv = prefix_backward(grad, out, lse, blank_masked(call))
        for x, add in zip((grad_q[:, :, :prefix], grad_k, grad_v), (dq, dk, dv)):
            x.copy_(add)

    # the groups, a few at a time
    for some in slices:
        part = _Part(call, some, (out, grad))
        of_list = _backward_part(part, call, grad, out, lse, grad_q)
        _add_keys(part, of_list[:2], (grad_k, grad_v))
        for x, found in zip(further, _further(part, of_list)):
            if x is not None:
                x[:, :, some] = found
    return grad_q, grad_k.to(call.k.dtype), grad_v.to(call.v.dtype), *further


def _backward_part(
    part: _Part, call: Call, grad: Tensor, out: Tensor, lse: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the list, part_k, part_v and part_biases; those of the queries into
    ``grad_q``."""
    q, delta = call.q, torch.empty_like(lse)
    scales = (call.scale, call.scale / math.log(2))

    # queries
    options = options_for("backward_query", q, part.size, part.listed)
    tiles = triton.cdiv(part.size, options["BLOCK_M"])
    backend.launch(
        backward_query_kernel, part.grid(tiles), q, out, grad, lse, delta, grad_q, part.queries,
        *part.lists(), *part.strides(q, out, grad, grad_q), *scales, *part.sizes(tiles),
        **part.flags(), **options,
    )  # fmt: skip

    # what they read
    part_k, part_v, part_biases = (torch.empty_like(x, dtype=torch.float32) for x in part.lists())
    options = options_for("backward_keys", q, part.size, part.listed)
    tiles = triton.cdiv(part.listed, options["BLOCK_N"])
    backend.launch(
        backward_list_kernel, part.grid(tiles), q, grad, lse, delta, part_k, part_v, part_biases,
        part.queries, *part.lists(), *part.strides(q, grad), *scales, *part.sizes(tiles),
        **part.flags(), **options,
    )  # fmt: skip
    return part_k, part_v, part_biases


def _add_keys(part: _Part, of_list: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
    """Add gradients of the list to those of the tokens: prefix tokens are in every list, others in
    some."""
    for x, add in zip(grads, of_list):
        x[:, :, : part.prefix] += add[:, :, :, : part.prefix].sum(2)
    block = _SUM_TILE // part.flags()["BLOCK_D"]
    tiles = triton.cdiv(part.tokens, block)
    backend.launch(
        sum_kernel, (part.pairs * tiles,), *of_list, *grads, *part.places(), *part.strides(*grads),
        *part.shared, part.tokens, part.prefix, part.num_keys, part.listed, tiles, BLOCK=block,
        **part.flags(), **backend.no_spills(part.keys.device),
    )  # fmt: skip


def _further(part: _Part, of_list: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Gradients of log weights, which the heads of a route share, and of what is pooled."""
    end = part.prefix + part.num_keys
    own = of_list[2][..., part.prefix : end]
    yield own.unflatten(1, (part.keys.shape[1], -1)).sum(2)
    yield from (x[:, :, :, end : part.listed] for x in of_list)
