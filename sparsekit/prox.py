"""Proximal maps: argmin_x 1/2 ||x - v||^2 + t * Omega(x), in closed form. Pure mathematics on tensors.

Source: Parikh and Boyd, "Proximal Algorithms", 2014, sections 6.5.2 (l1) and 6.5.4 (sums of norms).
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """Proximal map of t * ||x||_1: sign(v) * max(|v| - t, 0), element by element. `t` broadcasts against `v`."""
    return torch.sign(v) * torch.clamp(v.abs() - t, min=0)


def block_shrinkage(norms: Tensor, t: Tensor | float) -> Tensor:
    """Factor max(1 - t / norm, 0) by which the proximal map of t * ||x||_2 scales a whole group.

    `norms` (n_groups,) are the groups' Euclidean norms, `t` >= 0 a number or one for each group. A group whose
    norm is at most `t` gets exactly 0; a zero group stays zero, and `t` = 0 gives exactly 1 (never NaN).
    """
    t = torch.as_tensor(t, dtype=norms.dtype, device=norms.device)
    return torch.clamp(1 - t / norms.clamp_min(torch.finfo(norms.dtype).tiny), min=0)
