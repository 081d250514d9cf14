"""Weight-standardised convolutions, as in NormFree networks and BiT: their filters are normalised over what they read.

With an input channel gone the rest would be normalised to something else, so a cut that takes columns first turns the
layer into the plain convolution it computes: the standardised filters become the weight, and a gain is multiplied in.
Rows can go without that, every filter being normalised by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

_KINDS = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def is_standardised(module: nn.Module) -> bool:
    """Whether the module is one of timm's weight-standardised convolutions."""
    return isinstance(module, nn.Conv2d) and type(module).__name__ in _KINDS


def effective_weight(module: Any) -> Tensor:
    """The filters the layer convolves with: (w - mean) / sqrt(var + eps) x gain x scale, each filter by itself."""
    weight: Tensor = module.weight
    flat = weight.flatten(1)
    variance, mean = torch.var_mean(flat, 1, correction=0, keepdim=True)
    standardised = (flat - mean) / (variance + module.eps).sqrt()
    if isinstance(gain := getattr(module, "gain", None), Tensor):
        standardised = standardised * (gain * module.scale).reshape(-1, 1)
    effective: Tensor = standardised.reshape_as(weight)
    return effective


def make_plain_(model: nn.Module, names: Iterable[str]) -> None:
    """Turn the named standardised convolutions of `model` into plain ones that compute the same, in place."""
    for name in names:
        module = model.get_submodule(name)
        with torch.no_grad():
            weight = effective_weight(module)
        requires_grad = bool(module.weight.requires_grad)
        module.weight = nn.Parameter(weight, requires_grad=requires_grad)
        if "gain" in module._parameters:
            del module.gain
        module.__class__ = _plain_class(module)


def _plain_class(module: nn.Module) -> type[nn.Conv2d]:
    if getattr(module, "same_pad", False):
        return Conv2dSame
    return nn.Conv2d
