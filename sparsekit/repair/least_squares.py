"""The mathematics of repair: predict the columns that go from those that stay, and find which are best left out.

A layer reads rows x of K columns and gives W x + b. Without the columns d it gives the least squared change if what it
loses, W_d x_d, is replaced by its best affine prediction from the columns k that stay. With the covariance C of x and
its mean m:

    W_k += W_d B^T,    b += W_d (m_d - B^T m_k),    B = (C_kk + ridge)^-1 C_kd

Everything here has a leading dimension for the conv_groups of a layer, which are separate problems of one size.
Sources: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", 1992; Kurtic et al.,
"ZipLM", 2023; He, Zhang and Sun, "Channel pruning for accelerating very deep neural networks", 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The ridge, relative to the mean variance of a column. Between 1e-4 and 1e-1 it hardly matters.
_RIDGE = 1e-3
# With fewer rows than this times the columns, the covariance is uncertain, and the ridge is larger.
_ENOUGH_ROWS = 5
_LARGER_RIDGE = 100
# Columns that are gone are left out once they are this share of all.
_MOST_GONE = 0.15
# A refit starts near to the weights it has, so it takes so many times the ridge: its images are few.
_REFIT_RIDGE = 100


@dataclass(frozen=True)
class Moments:
    """Mean (conv_groups, K) and covariance (conv_groups, K, K) of a layer's columns over `rows` rows; float64."""

    mean: Tensor
    covariance: Tensor
    rows: float

    @property
    def ridge(self) -> Tensor:
        """What is added to the variances (conv_groups,), so that few rows do not decide too much."""
        size = self.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        few = self.rows < _ENOUGH_ROWS * self.covariance.shape[-1]
        smallest = torch.finfo(torch.float64).tiny ** 0.5
        return (_RIDGE * (_LARGER_RIDGE if few else 1) * size).clamp_min(smallest)


def absorb(weight: Tensor, kept: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return weights without the columns that go, and what to add to the bias, by least squares.

    `weight` is (conv_groups, outputs, K), float64; `kept` is bool (conv_groups, K), with equally many in each
    conv_group. The new weight has its shape, with zeros where columns go; the bias's part is (conv_groups, outputs).
    """
    new, shift = torch.zeros_like(weight), torch.zeros_like(weight[..., 0])
    for g in range(len(weight)):
        stays, goes = kept[g].nonzero()[:, 0], (~kept[g]).nonzero()[:, 0]
        lost = weight[g][:, goes]
        covariance = moments.covariance[g]
        within = covariance[stays][:, stays] + moments.ridge[g] * torch.eye(len(stays)).to(weight)
        taken_over = _solve(within, covariance[stays][:, goes] @ lost.T).T
        new[g][:, stays] = weight[g][:, stays] + taken_over
        shift[g] = lost @ moments.mean[g][goes] - taken_over @ moments.mean[g][stays]
    return new, shift


def fit(weight: Tensor, cross: Tensor, moments: Moments) -> Tensor:
    """Return the weights (conv_groups, outputs, K) that give targets y from rows x best, near to `weight`.

    `cross` (conv_groups, outputs, K) is the covariance of y and x. The ridge draws towards `weight`:
    (cross + ridge weight) (C + ridge)^-1.
    """
    ridge = _REFIT_RIDGE * moments.ridge[:, None, None]
    within = moments.covariance + ridge * torch.eye(cross.shape[-1]).to(cross)
    right = (cross + ridge * weight).mT
    return torch.stack([_solve(a, b).T for a, b in zip(within, right, strict=True)])


@dataclass(frozen=True)
class Columns:
    """One layer that reads the channels of a group.

    - `weight` (outputs, K) is weighed by how much the model's outputs depend on each output of the layer.
    - `moments` is of one conv_group. `own` (n_channels, q) are the columns of each channel.
    """

    weight: Tensor
    moments: Moments
    own: Tensor


def greedy_order(layers: Sequence[Columns], *, at_once: int = 1) -> tuple[Tensor, Tensor]:
    """Order the channels of a group by what their removal costs the layers that read them, the cheapest first.

    A channel c with columns o costs the sum over the layers of tr(W_o [(H^-1)_oo]^-1 W_o^T): the squared change of the
    outputs after the best prediction from the columns that are left. After each removal of `at_once` channels W and
    H^-1, H = covariance + ridge, are those of the columns left. Exact for 1.

    Returns the order (n_channels,) and the summed cost (n_channels + 1,) of removing the first so many.
    """
    states = [_Surgeon(layer) for layer in layers]
    n = len(layers[0].own)
    alive = torch.ones(n, dtype=torch.bool, device=layers[0].weight.device)
    order: list[int] = []
    costs = [0.0]
    while len(order) < n:
        cost = torch.stack([state.costs(alive) for state in states]).sum(0)
        cost = cost.masked_fill(~alive, torch.inf)
        take = min(at_once, n - len(order))
        # Of several at once each is taken by its cost alone; what they cost together is counted exactly.
        chosen = cost.argsort(stable=True)[:take]
        costs_together = sum(state.remove_(chosen) for state in states)
        share = (cost[chosen] / cost[chosen].sum().clamp_min(torch.finfo(torch.float64).tiny)).tolist()
        for c, part in zip(chosen.tolist(), share, strict=True):
            order.append(c)
            costs.append(costs[-1] + float(costs_together) * part)
        alive[chosen] = False
    return torch.tensor(order), torch.tensor(costs, dtype=torch.float64)


def costs_of_order(layers: Sequence[Columns], order: Tensor) -> Tensor:
    """Return the summed cost (n_channels + 1,) of removing the first so many channels of an order; exact.

    With H = L L^T, the columns that are left longest first, the part of W x that the first columns cannot predict is
    that of the other rows of L^T W^T.
    """
    costs = torch.zeros(len(order) + 1, dtype=torch.float64)
    for layer in layers:
        covariance = layer.moments.covariance[0]
        own = layer.own[order.flip(0).to(layer.own.device)].flatten()
        others = torch.ones(len(covariance), dtype=torch.bool, device=own.device)
        others[own] = False
        columns = torch.cat([others.nonzero()[:, 0], own])
        ridge = layer.moments.ridge[0] * torch.eye(len(covariance)).to(covariance)
        root = torch.linalg.cholesky((covariance + ridge)[columns][:, columns])
        left = (root.T @ layer.weight[:, columns].T).square().sum(1)[-len(own) :]
        costs[1:] += left.reshape(len(order), -1).sum(1).flip(0).cumsum(0).cpu()
    return costs


class _Surgeon:
    """The weight of a layer and the inverse of its H while columns go, one set after the other."""

    def __init__(self, layer: Columns) -> None:
        self._weight = layer.weight.clone()
        covariance = layer.moments.covariance[0]
        ridge = layer.moments.ridge[0] * torch.eye(len(covariance)).to(covariance)
        self._inverse = torch.linalg.inv(covariance + ridge)
        self._own = layer.own
        self._gone = torch.zeros(len(covariance), dtype=torch.bool, device=covariance.device)

    def costs(self, alive: Tensor) -> Tensor:
        q = self._own.shape[1]
        if q == 1:
            columns = self._own[:, 0]
            diagonal = self._inverse.diagonal()[columns]
            singly: Tensor = self._weight[:, columns].square().sum(0) / diagonal.where(alive, 1.0)
            return singly
        found = torch.zeros(len(self._own)).to(self._weight)
        living = alive.nonzero()[:, 0]
        own = self._own[living]
        blocks = self._inverse[own[:, :, None], own[:, None, :]]
        columns = self._weight[:, own].permute(1, 2, 0)  # (living, q, outputs)
        found[living] = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
        return found

    def remove_(self, channels: Tensor) -> float:
        """Take the columns of these channels out; returns the cost."""
        o = self._own[channels].flatten()
        block = self._inverse[o][:, o]
        rows = self._inverse[o]
        solved = _solve(block, torch.cat([rows, self._weight[:, o].T], 1))
        cost = float((self._weight[:, o].T * solved[:, rows.shape[1] :]).sum())
        self._weight -= self._weight[:, o] @ solved[:, : rows.shape[1]]
        self._inverse -= rows.T @ solved[:, : rows.shape[1]]
        self._weight[:, o] = 0
        self._inverse[o], self._inverse[:, o] = 0, 0
        self._gone[o] = True
        if int(self._gone.sum()) > _MOST_GONE * len(self._gone):
            self._forget_()
        return cost

    def _forget_(self) -> None:
        """Leave out the columns that are gone: what is left takes less time."""
        stays = (~self._gone).nonzero()[:, 0]
        number = torch.zeros_like(self._gone, dtype=torch.int64)
        number[stays] = torch.arange(len(stays), device=stays.device)
        # Channels that are gone point anywhere: nothing looks at them any more.
        self._own = number[self._own]
        self._weight, self._inverse = self._weight[:, stays], self._inverse[stays][:, stays]
        self._gone = self._gone[stays]


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive definite system; one that is singular to rounding is solved by least squares."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed):
        return torch.cholesky_solve(right, factor)
    solved: Tensor = torch.linalg.pinv(matrix, hermitian=True) @ right
    return solved
