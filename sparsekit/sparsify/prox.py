"""Proximal maps: argmin_x 1/2 ||x - v||^2 + t * Omega(x), in closed form. Pure mathematics on tensors.

Sources: Parikh and Boyd, "Proximal Algorithms", 2014, sections 6.5.2 (l1) and 6.5.4 (sums of norms); Simon et al., "A
Sparse-Group Lasso", 2013 (soft threshold first, then the block); Zhang, "Nearly unbiased variable selection under
minimax concave penalty", 2010 (MCP; of groups: Huang, Breheny and Ma, 2012).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def soft_threshold_(tensors: Sequence[Tensor], t: Sequence[Tensor]) -> None:
    """Apply the proximal map of t * ||x||_1 to each tensor, in place: sign(v) * max(|v| - t, 0), element by element.

    `t` >= 0 has one tensor for each, which broadcasts against it. The result is exactly 0 where |v| <= t.
    """
    tensors, t = list(tensors), list(t)
    inside = torch._foreach_maximum(list(torch._foreach_minimum(tensors, t)), list(torch._foreach_neg(t)))
    torch._foreach_sub_(tensors, list(inside))


def block_shrinkage(norms: Tensor, t: Tensor | float) -> Tensor:
    """Return the factor max(1 - t / norm, 0) by which the proximal map of t * ||x||_2 scales a whole group.

    `norms` (n_groups,) are the groups' Euclidean norms, `t` >= 0 a number or one for each group. A group whose
    norm is at most `t` gets exactly 0; a zero group stays zero, and `t` = 0 gives exactly 1 (never NaN).
    """
    t = _like(norms, t)
    return torch.clamp(1 - t / norms.clamp_min(torch.finfo(norms.dtype).tiny), min=0)


def mcp_shrinkage(norms: Tensor, t: Tensor | float, rate: Tensor | float, concavity: float = 3.0) -> Tensor:
    """Return the factor by which the proximal map of rate * MCP(||x||_2) scales a whole group.

    With strength lam = t / rate, MCP(r) = lam r - r^2 / (2 concavity) up to r = concavity x lam, and is constant from
    there on. Near 0 it shrinks like a group lasso; groups beyond keep their size. The factor is

        0                                                     for norm <= t
        concavity / (concavity - rate) x (1 - t / norm)       for norm <= concavity x lam
        1                                                     beyond

    `norms` and `t` are as in `block_shrinkage`, `rate` > 0 is a number or one for each group. For `rate` >= `concavity`
    the objective is concave near 0, and the map is a hard threshold at lam sqrt(rate x concavity).
    """
    t, rate = _like(norms, t), _like(norms, rate)
    survives = (norms > t * (concavity / rate).sqrt()).to(norms.dtype)
    inner = block_shrinkage(norms, t) * (concavity / (concavity - rate))
    soft = torch.where(norms > concavity / rate * t, 1.0, inner)
    return torch.where(rate >= concavity, survives, soft).to(norms.dtype)


def _like(norms: Tensor, value: Tensor | float) -> Tensor:
    """Return `value` as a tensor like `norms`. A number is filled in on the device: a copy would wait."""
    return value.to(norms) if isinstance(value, Tensor) else norms.new_full((), value)
