"""Rows that layers read, made by hand, their moments, and what it costs to leave columns out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsekit.repair.least_squares import Columns, Moments


def correlated(rows: int, columns: int, seed: int) -> Tensor:
    """Rows whose columns depend on each other, with means of their own."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return x @ mixing + torch.randn(columns, generator=generator, dtype=torch.float64)


def moments(*of: Tensor) -> Moments:
    """The moments of the rows of each conv_group."""
    mean = torch.stack([x.mean(0) for x in of])
    return Moments(mean, torch.stack([torch.cov(x.T, correction=0) for x in of]), len(of[0]))


def weights(conv_groups: int, outputs: int, columns: int, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(conv_groups, outputs, columns, generator=generator, dtype=torch.float64)


def true_cost(x: Tensor, weight: Tensor, gone: list[int], ridge: float) -> float:
    """The least change of the outputs without the columns that are gone, counting changes of weights by the ridge."""
    n, k = x.shape
    stays = [i for i in range(k) if i not in gone]
    design = np.concatenate([(x - x.mean(0)).numpy() / np.sqrt(n), np.sqrt(ridge) * np.eye(k)])
    wanted = design @ weight.T.numpy()
    if not stays:
        return float((wanted**2).sum())
    solved = np.linalg.lstsq(design[:, stays], wanted, rcond=None)[0]
    return float(((wanted - design[:, stays] @ solved) ** 2).sum())


def layers(n: int, q: int, readers: int) -> tuple[list[Columns], list[Tensor]]:
    """Layers that read the n channels as q columns each, in an order of their own, and a column of others."""
    rows = [correlated(300, n * q + 1, seed) for seed in range(readers)]
    own = torch.randperm(n * q, generator=torch.Generator().manual_seed(5)).reshape(n, q)
    return [Columns(weights(1, 3, n * q + 1, s)[0], moments(x), own) for s, x in enumerate(rows)], rows
