"""What is asked of a picture's patch tokens, and how much of it they give."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from benchmarks.rivals.clusters import k_means

_CLUSTERS = 8
_RIDGE = 0.1  # over the mean square of the features
_SALIENT = 0.5


class Probe:
    """A linear classifier of patch tokens, by ridge regression (Hoerl and Kennard 1970).

    Args:
        tokens: (N, C), ``labels`` (N,), -1 for those to leave out.
    """

    def __init__(self, tokens: Tensor, labels: Tensor):
        tokens, labels = tokens[labels >= 0].double(), labels[labels >= 0]
        self.mean = tokens.mean(0)
        x, y = tokens - self.mean, one_hot(labels).double()
        self.bias = y.mean(0)
        weight = _RIDGE * x.square().mean() * len(x)
        gram = x.mT @ x + weight * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(gram, x.mT @ (y - self.bias))

    def __call__(self, tokens: Tensor) -> Tensor:
        """(N,), the class of each of (N, C)."""
        return ((tokens.double() - self.mean) @ self.weight + self.bias).argmax(-1)


def matched(first: Tensor, second: Tensor, truth: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Correspondence by the nearest token, by cosine.

    Args:
        first, second: (N, C), tokens of two views; ``truth`` (N, 2), see
            :class:`~benchmarks.tasks.scenes.Views`.
        columns: of patches.

    Returns:
        Of the patches of ``second`` with a known truth, how far their nearest token of ``first`` is
        from it, in patches, the larger of rows and columns; and (N,) the nearest of each.
    """
    nearest = (normalize(second, dim=-1) @ normalize(first, dim=-1).mT).argmax(-1)
    found = torch.stack([nearest // columns, nearest % columns], -1)
    known = truth.isfinite().all(-1)
    return (found - truth)[known].abs().amax(-1), nearest


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of what is salient in two maps; 1 where nothing is in both."""
    one, other = one > _SALIENT, other > _SALIENT
    union = (one | other).sum()
    return ((one & other).sum() / union).item() if union else 1.0


def clusters(full: Tensor) -> Tensor:
    """(K, C), means of k-means clusters of tokens (N, C)."""
    of = k_means(full.unsqueeze(0), _CLUSTERS, 10, seed=0)[0]
    return torch.stack([full[of == number].mean(0) for number in of.unique()])


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of places with the same label."""
    return (one == other).double().mean().item()
