"""The autoregressive attention in plain loops, for tests only."""

import math

import torch

from colt5_vision.ops import soft_topk


def twin(module, x, mask=None, count_q=None, count_kv=None):
    """One sample (N, C), token by token and window by window, in plain loops."""
    length, w, light, heavy = len(x), module.heavy_window_size, module.light_attn, module.heavy_attn
    valid = [True] * length if mask is None else mask.tolist()
    straight = module.kv_router.straight_through

    def attend(q, k, v):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    q, k, v = light.to_qkv(light.norm(x)).view(length, 3, light.heads, -1).permute(1, 2, 0, 3)
    out = []
    for i in range(length):
        seen = [
            j
            for j in range(max(0, i // light.window_size - 1) * light.window_size, i + 1)
            if valid[j]
        ]
        out.append(
            light.to_out(attend(q[:, [i]], k[:, seen], v[:, seen]).flatten())
            if seen
            else torch.zeros_like(x[0])
        )
    query_logits, key_logits = module._logits(x[None], 0)
    slots, ratio = (
        module.num_heavy_tokens_kv if count_kv is None else count_kv,
        module.kv_router.fetch_k_ratio,
    )
    if module.q_router is not None:
        own = module.num_heavy_tokens_q
        most = count_q or (round(own * w) if isinstance(own, float) else own)
    routes, group = heavy.routes, heavy.heads // heavy.routes
    kept = [[] for _ in range(routes)]
    for start in range(w, length, w):
        gates = []
        for r in range(routes):
            candidates = kept[r] + [j for j in range(start - w, start) if valid[j]]
            kept[r] = sorted(candidates, key=lambda j: (-key_logits[0, r, j].item(), j))[:slots]
            ones = dict.fromkeys(candidates, 1.0)
            if not straight and candidates:
                soft = soft_topk(key_logits[0, r, candidates], min(slots * ratio, len(candidates)))
                ones = dict(zip(candidates, soft))
            gates.append([ones[j] for j in kept[r]])
        places = list(range(start, min(start + w, length)))
        taken, query_gate = dict.fromkeys(places, True), dict.fromkeys(places, 1.0)
        if module.q_router is not None:
            past = sorted(
                (query_logits[0, j].item() for j in range(start - w, start) if valid[j]),
                reverse=True,
            )
            limit = past[most - 1] if len(past) >= most else -math.inf
            above = [j for j in places if valid[j] and query_logits[0, j] > limit]
            taken = {j: j in above[:most] for j in places}
            low, high = -50.0, 50.0  # bisection for the level of the window before
            for _ in range(200):
                mid = (low + high) / 2
                total = sum(min(1, math.exp(s + mid)) for s in past)
                low, high = (mid, high) if total < most * ratio else (low, mid)
            if not straight and len(past) > most * ratio:
                query_gate = {j: min(1, math.exp(query_logits[0, j] + high)) for j in places}
        normed = heavy.norm(x)
        for i in places:
            if not taken[i]:
                out[i] = out[i] + (0 if module.null_q_token is None else module.null_q_token)
                continue
            parts = []
            query = heavy.to_q(normed[i]).view(heavy.heads, 1, -1)
            query = query * (query_gate[i] if heavy.multiply_queries_by_score else 1)
            for r in range(routes):
                weight = heavy.to_kv.weight.chunk(routes)[r]
                kv = (
                    (normed[kept[r]] @ weight.T)
                    .view(-1, group, 2, heavy.null_key.kv.shape[-1])
                    .permute(2, 1, 0, 3)
                )
                gate = torch.tensor(gates[r], dtype=x.dtype)[:, None]
                kv = torch.stack(
                    [kv[0] * gate if heavy.multiply_keys_by_score else kv[0], kv[1] * gate]
                )
                kv = torch.cat([heavy.null_key.kv[:, r * group : (r + 1) * group, None], kv], 2)
                parts.append(attend(query[r * group : (r + 1) * group], *kv))
            out[i] = out[i] + heavy.to_out(torch.cat(parts).flatten()) * query_gate[i]
    return torch.stack([o if ok else torch.zeros_like(x[0]) for o, ok in zip(out, valid)])
