"""How keep-masks are rounded up: channels between two multiples cost nothing, so they stay."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.structure.groups import Rounding


def round_up(mask: Tensor, importance: Tensor, rounding: Rounding) -> Tensor:
    """Keep more of the most important channels, up to the next multiple and at least the least.

    `mask` (bool) and `importance` are (n_channels,). At most all channels are kept. ONNX Runtime takes as long for a
    number between two multiples as for the upper one.
    """
    n = mask.numel()
    wanted = max(int(mask.sum()), min(rounding.least, n))
    wanted = min(-(-wanted // rounding.multiple) * rounding.multiple, n)
    order = torch.where(mask, torch.inf, importance).argsort(descending=True, stable=True)
    rounded = torch.zeros_like(mask)
    rounded[order[:wanted]] = True
    return rounded


def keep_too(mask: Tensor, channel: int, spare: Tensor, importance: Tensor, multiple: int) -> Tensor:
    """Keep `channel` too, in the place of a kept channel that is `spare` if there is one.

    Otherwise one more is kept, and the number is rounded up as in `round_up`.
    """
    kept = mask.clone()
    kept[channel] = True
    replaceable = (mask & spare).nonzero().flatten()
    if not len(replaceable):
        return round_up(kept, importance, Rounding(multiple))
    kept[replaceable[-1]] = False
    return kept
