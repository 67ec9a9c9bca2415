"""The branches of the autoregressive attention: causal windows for every token, routed keys of the
past."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..branches import HeavyBranch, merge_heads, split_heads
from ..ops.sdpa import scaled_dot_product_attention
from ..positions import rotary


class CausalWindowAttention(nn.Module):
    """The light branch: every token attends to its window up to itself, and to the whole window
    before.

        x (B, N, C) ─ norm ─ to_qkv ─ causal attention to two windows ─ to_out

    Args:
        dim: width C.
        heads, dim_head: number of heads and width of each.
        window_size: tokens of a window.
        device, dtype: of the parameters.
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, window_size: int, *, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.heads, self.dim_head, self.window_size = heads, dim_head, window_size
        self.norm = nn.LayerNorm(dim, **factory)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)

    def _project(self, x: Tensor) -> Tensor:
        """(3, B, N, heads, head_dim)."""
        return self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, C), mask (B, N) -> output (B, N, C), and keys and values (2, B, N, heads,
        head_dim)."""
        length, width = x.shape[1], self.window_size
        windows = (length + width - 1) // width
        spare = windows * width - length

        # queries of each window (B, windows, w, heads, head_dim), keys of it and of the one before
        qkv = self._project(x)
        q, k, v = pad(qkv, (0, 0, 0, 0, 0, spare)).unflatten(2, (windows, width)).unbind(0)
        k, v = (torch.cat([pad(t, (0,) * 6 + (1, 0))[:, :-1], t], 2) for t in (k, v))

        # who sees whom: what came before, in these two windows, and is valid
        number, step = (torch.arange(n, device=x.device) for n in (windows, 2 * width))
        own = step[width:].unsqueeze(1)
        inside = ((number > 0).unsqueeze(1) | (step >= width))[None, :, None]
        if mask is not None:
            valid = pad(mask, (width, spare)).unfold(1, 2 * width, width).unsqueeze(2)
            # a token always sees itself: what is masked is nobody else's, and a softmax over
            # nothing is NaN
            inside = (inside & valid) | (step == own)
        allowed = (step <= own) & inside

        # attention, a window a row of the batch
        allowed = allowed.expand(x.shape[0], -1, -1, -1).flatten(0, 1).unsqueeze(1)
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
        out = merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=allowed))
        out = out.unflatten(0, (x.shape[0], windows)).flatten(1, 2)[:, :length]
        return self.to_out(out), qkv[1:]

    def first_seen(self, position: int) -> int:
        """The first position that the token at ``position`` sees."""
        return max(0, position // self.window_size - 1) * self.window_size

    def step(
        self, x: Tensor, valid: Tensor, position: int, past: Tensor, past_valid: Tensor
    ) -> tuple[Tensor, ...]:
        """New tokens x (B, n, C) from ``position`` on, after ``past`` keys and values (2, B, P,
        heads, head_dim).

        Returns:
            Output (B, n, C), and ``past`` and its validity (B, P) for the next step.
        """
        q, *kv = self._project(x).unbind(0)
        past, past_valid = torch.cat([past, torch.stack(kv)], 2), torch.cat([past_valid, valid], 1)
        end = position + x.shape[1]
        start = end - past.shape[2]

        # who sees whom, and itself in any case
        keys = torch.arange(start, end, device=x.device)
        queries = torch.arange(position, end, device=x.device).unsqueeze(1)
        first = (queries // self.window_size - 1) * self.window_size
        seen = (keys <= queries) & (keys >= first)
        allowed = ((seen & past_valid.unsqueeze(1)) | (keys == queries)).unsqueeze(1)

        k, v = past.transpose(2, 3).unbind(0)
        out = merge_heads(scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=allowed))
        spent = max(0, self.first_seen(end) - start)
        # contiguous, as at first: for other strides a step would be compiled anew
        kept = (past[:, :, spent:].contiguous(), past_valid[:, spent:].contiguous())
        return self.to_out(out), *kept


class PastKeysBranch(HeavyBranch):
    """The heavy branch, with the weights of the others', for keys of each window gathered from the
    projected past.

    Normalised tokens attend to routed keys and one null key, the heads split over the routes.
    """

    def key_values(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Keys and values (B, N, R, heads / R, 2, head_dim) of normalised tokens (B, N, C) at
        ``positions`` (N,)."""
        kv = self.to_kv(tokens).unflatten(-1, (self.routes, self.heads // self.routes, 2, -1))
        if not self.rotary_emb:
            return kv
        k, v = kv.unbind(-2)
        return torch.stack([rotary(k, positions.view(-1, 1, 1)), v], -2)

    def with_null(self, kv: Tensor) -> Tensor:
        """``kv`` (B, N, R, heads / R, 2, head_dim) with the null key and value in front: (B, 1 + N,
        ...)."""
        null = self.null_key(kv.dtype).unflatten(1, (self.routes, -1)).permute(1, 2, 0, 3)
        return torch.cat([null.expand(kv.shape[0], 1, *null.shape), kv], 1)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Tensor,
        key_gates: Tensor | None,
        key_mask: Tensor | None,
        query_gates: Tensor | None,
    ) -> Tensor:
        """Attend.

        Args:
            tokens: (S, n, C), normalised.
            positions: (S or 1, n), for rotary.
            kv: (S, 1 + K, R, heads / R, 2, head_dim), the null key first.
            key_gates, key_mask: (S, R, K), or None: 1, all valid.
            query_gates: (S, n), multiply the queries where the branch is made so.

        Returns:
            (S, n, C).
        """
        # queries
        q = split_heads(self.to_q(tokens), self.heads)  # (S, heads, n, head_dim)
        if query_gates is not None and self.multiply_queries_by_score:
            q = q * query_gates.to(q.dtype)[:, None, :, None]
        if self.rotary_emb:
            q = rotary(q, positions.unsqueeze(1))

        # keys and values
        k, v = kv.unbind(-2)  # (S, 1 + K, R, heads / R, head_dim)
        if key_gates is not None:
            gates = pad(key_gates.to(v.dtype), (1, 0), value=1).mT[..., None, None]
            v = v * gates
            k = k * gates if self.multiply_keys_by_score else k
        k, v = (t.flatten(2, 3).transpose(1, 2) for t in (k, v))  # (S, heads, 1 + K, head_dim)

        seen = None
        if key_mask is not None:
            seen = pad(key_mask, (1, 0), value=True).unsqueeze(2)
            seen = self._per_head(seen) if self.routes > 1 else seen
        return self.to_out(merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=seen)))
