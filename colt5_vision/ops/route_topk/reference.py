"""Hard selection, the specification: a sort in plain Python."""

from torch import Tensor


def route_topk(scores: Tensor, mask: Tensor, k: int) -> tuple[list[int], list[bool]]:
    """The k best of one row and whether each is valid.

    Valid before masked, then the higher score, then the lower index.

    Args:
        scores: (n,), no NaN.
        mask: (n,) bool, True = valid.
        k: tokens to take; above n: all.
    """
    scores, mask = scores.tolist(), mask.tolist()
    order = sorted(
        range(len(scores)), key=lambda i: (not mask[i], -scores[i] if mask[i] else 0.0, i)
    )[:k]
    return order, [mask[i] for i in order]
