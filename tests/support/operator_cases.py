"""Every public operator as a function of its differentiable inputs, for tests of a whole kind."""

from dataclasses import dataclass
from functools import partial

import torch

from colt5_vision import ops
from colt5_vision.routing import Routing


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def distinct(*shape, limit, seed=3):
    return randn(*shape[:-1], limit, seed=seed).argsort(-1)[..., : shape[-1]].contiguous()


@dataclass
class Case:
    """``call(*floats, *rest)``; the batch comes first in all but the inputs named shared."""

    call: callable
    floats: tuple
    rest: tuple = ()
    shared: tuple = ()  # positions of floats without a batch
    twice: bool = True  # differentiable twice on its usual path
    products: bool = True  # has matrix products, which FLOP counters count

    def to(self, dtype=None, device=None):
        floats = tuple(x.to(device=device, dtype=dtype) for x in self.floats)
        rest = tuple(x.to(device=device) for x in self.rest)
        return floats, rest


GRID = {"grid_size": (4, 5), "window_size": (2, 3)}
MASK = randn(2, 20, seed=11) > -0.8
ROUTED = distinct(2, 2, 3, limit=20)
ROUTED[1, 0, 2] = -1


def _join(light, heavy, gates, null, indices, mask, **how):
    return ops.join(light, heavy, Routing(indices, gates, gates, mask), null, **how)


def _attention(q, k, v, weights, routed, mask, queries, **how):
    return ops.routed_window_attention(
        q,
        k,
        v,
        routed_indices=routed,
        log_weights=weights,
        key_mask=mask,
        query_indices=queries,
        num_prefix_tokens=1,
        **GRID,
        **how,
    )


def _windows(q, k, v, **how):
    return ops.window_attention(q, k, v, **GRID, **how)


def _biased(q, k, v, routed, **how):
    def bias(i, j):
        return (i - j).abs() * -0.1

    return ops.routed_window_attention(
        q, k, v, routed_indices=routed, pair_bias=bias, **GRID, **how
    )


def _groups(q, k, v, weights, pooled_k, pooled_v, mass, groups, keys, mask, **how):
    pooled = ops.PooledKeys(pooled_k, pooled_v, mass)
    how |= {"log_weights": weights, "key_mask": mask, "num_prefix_tokens": 1}
    return ops.grouped_attention(q, k, v, groups, keys, pooled, **how)


def _qkv(length):
    return tuple(randn(2, 2, length, 8, seed=s) for s in range(3))


# of 20 tokens: groups of 7, 7 and 5, a token in none; their keys
GROUPS = torch.nn.functional.pad(distinct(2, 2, 19, limit=20, seed=8), (0, 2), value=-1)
GROUPS = GROUPS.unflatten(-1, (3, 7))
KEYS = distinct(2, 1, 3, 4, limit=20, seed=9)
KEYS[1, 0, 2, 1] = -1

FILLED = torch.tensor([[True, True, True], [True, True, False]])
CASES = {
    "join": Case(
        _join,
        (randn(2, 9, 5), randn(2, 3, 5, seed=1), randn(2, 3, seed=2), randn(5, seed=4)),
        (distinct(2, 3, limit=9), FILLED),
        shared=(3,),
        products=False,
    ),
    "gather_normalize": Case(
        lambda x, weight, indices, **how: ops.gather_normalize(x, indices, weight, **how),
        (randn(2, 9, 5), randn(5, seed=1)),
        (distinct(2, 2, 3, limit=9),),
        shared=(1,),
        products=False,
    ),
    "router_logits": Case(ops.router_logits, (randn(2, 9, 5), randn(3, 5, seed=1)), shared=(1,)),
    "soft_topk": Case(
        partial(ops.soft_topk, eps=0.5),
        (3 * randn(2, 12), torch.tensor([2.5, 4.0]).double()),
        products=False,
    ),
    "soft_topk masked": Case(
        lambda scores, mask, **how: ops.soft_topk(scores, 3, mask=mask, **how),
        (3 * randn(2, 20),),
        (MASK,),
        products=False,
    ),
    "coordinate_descent": Case(
        partial(ops.coordinate_descent, n_iters=7, eps=0.5, eps_init=2.0, eps_decay=0.7),
        (3 * randn(2, 12), torch.tensor([2.5, 4.0]).double()),
        twice=False,
        products=False,
    ),
    "window_attention": Case(_windows, _qkv(20), twice=False),
    "routed_window_attention": Case(
        _attention,
        (*_qkv(21), randn(2, 2, 3, seed=5)),
        (ROUTED, MASK, distinct(2, 7, limit=20, seed=7)),
        twice=False,
    ),
    "grouped_attention": Case(
        _groups,
        (
            *_qkv(21),
            randn(2, 1, 3, 4, seed=5),
            *(randn(2, 2, 3, 2, 8, seed=s) for s in (6, 7)),
            randn(2, 2, 3, 2, seed=8),
        ),
        (GROUPS, KEYS, MASK),
        twice=False,
    ),
    "routed_window_attention biased": Case(_biased, _qkv(20), (ROUTED,)),
}


def select(scores, mask, **how):
    """route_topk as a function of tensors alone; it has no derivative."""
    return ops.route_topk(scores, 4, mask=mask, grid_size=(4, 5), cell_size=2, **how)
