"""coor_descent: the predecessor's name, signature and gates."""

import colt5_attention as predecessor
import pytest
import torch

from colt5_vision.compat import coor_descent


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "how", [{}, {"eps": 1.0}, {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("each_row", [False, True])
def test_equals_the_predecessor(how, masked, each_row):
    s = randn(3, 40).requires_grad_()
    k = torch.tensor([2.0, 7.0, 9.5]).double() if each_row else 7
    mask = randn(3, 40, seed=1) > -0.5 if masked else None
    got, want = (
        f(s, n_iters=20, k=k, mask=mask, **how) for f in (coor_descent, predecessor.coor_descent)
    )
    torch.testing.assert_close(got, want)
    weight = randn(3, 40, seed=2)
    grads = [torch.autograd.grad((gates * weight).sum(), s)[0] for gates in (got, want)]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize(
    "name, error, how",
    [
        ("s", TypeError, {"s": [1.0]}),
        ("s", TypeError, {"s": torch.ones(3, dtype=torch.int64)}),
        ("s", ValueError, {"s": torch.tensor(1.0)}),
        ("s", ValueError, {"s": torch.ones(2, 0)}),
        ("k", ValueError, {"k": 0}),
        ("n_iters", ValueError, {"n_iters": 0}),
        ("eps", ValueError, {"eps": 0.0}),
        ("eps_decay", ValueError, {"eps_decay": 1.5}),
        ("mask", TypeError, {"mask": torch.ones(2, 9)}),
    ],
)
def test_errors_name_the_argument(name, error, how):
    with pytest.raises(error, match=rf"^{name}: "):
        coor_descent(**{"s": randn(2, 9), "n_iters": 5, "k": 2, **how})
