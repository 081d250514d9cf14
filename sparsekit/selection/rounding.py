"""How keep-masks are rounded."""

from __future__ import annotations

import torch
from torch import Tensor


def round_up(mask: Tensor, ranks: Tensor, multiple: int, min_channels: int) -> Tensor:
    """Keep as many more of the best-ranked channels as it takes to reach a multiple and the minimum.

    Channels between two multiples cost nothing in ONNX Runtime, so they are given back rather than wasted.
    """
    n = mask.numel()
    wanted = max(int(mask.sum()), min(min_channels, n))
    wanted = min(-(-wanted // multiple) * multiple, n)
    order = torch.where(mask, torch.inf, ranks).argsort(descending=True, stable=True)
    rounded = torch.zeros_like(mask)
    rounded[order[:wanted]] = True
    return rounded


def keep_too(mask: Tensor, channel: int, spare: Tensor, ranks: Tensor, multiple: int) -> Tensor:
    """Keep `channel` as well: in the place of a kept channel that is `spare`, if there is one.

    Otherwise one more is kept, and the number rounded up again as in `round_up`.
    """
    kept = mask.clone()
    kept[channel] = True
    replaceable = (mask & spare).nonzero().flatten()
    if not len(replaceable):
        return round_up(kept, ranks, multiple, 1)
    kept[replaceable[-1]] = False
    return kept
