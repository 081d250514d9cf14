"""The LASSO on channels: which ones are left longest when each of them has its price.

Channel c brings Z_c = W_o x_o to a layer that reads it: o are its columns, and x is without its mean, which the bias
takes over. Each channel gets a factor beta_c, and the penalty draws the factors to zero:

    minimise  1/2 E ||sum_c (1 - beta_c) Z_c||^2 + strength ||beta||_1

The Gram matrix A_cd = E <Z_c, Z_d>, summed over the layers, says all about the rows that this needs. As the strength
falls from where all factors are zero, one channel after the other enters. As in the source, W stays as it is along the
path, and least squares come after it, once.

Sources: He, Zhang and Sun, "Channel pruning for accelerating very deep neural networks", 2017; for the path, Efron et
al., "Least angle regression", 2004.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from sparsekit.repair.least_squares import Columns, costs_of_order

# A channel that adds less than this share of the largest energy to what others bring counts as their combination.
_DEPENDENT = 1e-10
# The library ends the path at a strength of about 1e-7, and gives up pivots below 1e-7. From this strength on, both lie
# where rounding decides.
_LARGEST_STRENGTH = 1e3
# So many steps for each channel are never needed: a channel that leaves the path again takes one more.
_MOST_STEPS = 100


def lasso_order(layers: Sequence[Columns]) -> tuple[Tensor, Tensor]:
    """Order the channels of a group by when they enter the path of the LASSO, the last to enter first.

    Channels that never enter go before all others, that of least energy E ||Z_c||^2 first. They bring nothing, or a
    combination of what others bring.

    Returns the order (n_channels,), and the summed cost (n_channels + 1,) of removing the first so many: as that of
    `greedy_order` it is what the best prediction from the columns left does not reach, whatever the factors are.
    """
    gram = sum(_gram(layer) for layer in layers)
    assert isinstance(gram, Tensor)
    energies = gram.diagonal().cpu()
    entered = torch.from_numpy(_entry_path(gram.cpu().numpy()))
    never = torch.ones(len(energies), dtype=torch.bool)
    never[entered] = False
    by_energy = energies.argsort(stable=True)
    order = torch.cat([by_energy[never[by_energy]], entered.flip(0)])
    return order, costs_of_order(layers, order)


def _gram(layer: Columns) -> Tensor:
    """Return A (n_channels, n_channels) of one layer: sums of W^T W * C over the columns of two channels."""
    n, q = layer.own.shape
    columns = layer.own.flatten()
    weight = layer.weight[:, columns]
    products = (weight.T @ weight).mul_(layer.moments.covariance[0][columns][:, columns])
    return products.reshape(n, q, n, q).sum((1, 3))


def _entry_path(gram: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the channels that are in at the end of the path, in the order in which they came to stay."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    free = _independent(gram)
    together = gram.sum(1)
    largest = abs(together[free]).max(initial=0.0)
    if largest == 0:
        return free[:0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the end of the path, where rounding decides
        # Factors may be negative, as in the source: the weights that come after them have signs of their own.
        _, active, _ = lars_path_gram(
            together[free] / largest * _LARGEST_STRENGTH,
            gram[np.ix_(free, free)] / largest * _LARGEST_STRENGTH,
            n_samples=1,
            method="lasso",
            max_iter=_MOST_STEPS * len(free),
            return_path=False,
        )
    return free[np.array(active, dtype=np.int64)]


def _independent(gram: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return channels of which none is a combination of the others, and all others are: those of largest energy."""
    _, pivots, rank, _ = lapack.dpstrf(gram, tol=_DEPENDENT * max(float(gram.diagonal().max()), 0.0))
    return np.sort(pivots[:rank] - 1).astype(np.int64)
