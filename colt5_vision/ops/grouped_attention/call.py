"""The checked arguments of a call, and its prefix queries, which attend to everything: what plain
torch and the kernels share."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import wide_dtype
from ..sdpa import attend, attend_backward, masked_logit


class Call(NamedTuple):
    """The checked arguments of a call. B samples, R routes, G groups of L queries."""

    q: Tensor  # (B, heads, P + N, D)
    k: Tensor
    v: Tensor
    groups: Tensor  # (B, R, G, L), -1 for an empty place
    keys: Tensor  # (B, R, G, M), -1 for an empty slot
    log_weights: Tensor | None  # (B, R, G, M)
    pooled_keys: Tensor | None  # (B, heads, G, C, D)
    pooled_values: Tensor | None
    log_mass: Tensor | None  # (B, heads, G, C)
    key_mask: Tensor | None  # (B, P + N)
    prefix: int
    scale: float

    @property
    def further(self) -> tuple[Tensor | None, ...]:
        """What gets gradients beside q, k and v."""
        return self.log_weights, self.pooled_keys, self.pooled_values, self.log_mass


def blank_masked(call: Call) -> Call:
    """What is masked is never read: a weight of 0 would not stop its NaN or inf."""
    if call.key_mask is None:
        return call
    off = ~call.key_mask[:, None, :, None]
    return call._replace(k=call.k.masked_fill(off, 0), v=call.v.masked_fill(off, 0))


def prefix_bias(call: Call) -> Tensor | None:
    """What is added to the logits of prefix queries, (B, 1, 1, P + N)."""
    if call.key_mask is None:
        return None
    bias = torch.zeros(call.key_mask.shape, dtype=wide_dtype(call.q), device=call.q.device)
    return bias.masked_fill(~call.key_mask, masked_logit(call.q))[:, None, None]


def prefix_forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (B, heads, P, D) and lse (B, heads, P) of the prefix queries of a call whose masked keys
    are blank; +inf for a query without any key."""
    own = call.q[:, :, : call.prefix]
    out, lse = attend(own, call.k, call.v, prefix_bias(call), call.scale)
    empty = lse < masked_logit(call.q) / 2
    return out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, float("inf"))


def prefix_backward(
    grad: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the prefix queries, and what these give to all keys and values."""
    own_grad, own_q, own_out, own_lse = (x[:, :, : call.prefix] for x in (grad, call.q, out, lse))
    own = (own_grad, own_q, call.k, call.v, own_out, own_lse)
    dq, dk, dv = attend_backward(*own, prefix_bias(call), call.scale)
    if call.key_mask is not None:
        off = ~call.key_mask[:, None, :, None]
        dk, dv = dk.masked_fill(off, 0), dv.masked_fill(off, 0)
    return dq, dk, dv
