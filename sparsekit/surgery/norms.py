"""What a cut does to norms: response norms, root mean square norms, and standardised convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.structure.plan import TensorCut

_KINDS = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def make_up_for_the_mean_(model: nn.Module, cut: TensorCut) -> None:
    """Change epsilon and scale of a norm by a mean over channels, so that the cut leaves its outputs; in place.

    Of d channels k stay and the others are zero. With m the mean over all d and m' that over the k, m = m' k / d. So a
    global response norm x / (m + eps) is (d / k) x / (m' + eps d / k), and a root mean square norm x / sqrt(m + eps),
    with m the mean of squares, is sqrt(d / k) x / sqrt(m' + eps d / k): exactly.
    """
    module: Any = model.get_submodule(cut.tensor.rpartition(".")[0])
    ratio = (len(cut.keep) + len(cut.drop)) / len(cut.keep)
    is_root_mean_square = hasattr(module, "normalized_shape")
    with torch.no_grad():
        module.weight.mul_(ratio**0.5 if is_root_mean_square else ratio)
    module.eps *= ratio
    if is_root_mean_square:
        module.normalized_shape = (len(cut.keep),)


def is_standardised(module: nn.Module) -> bool:
    """Whether the module is one of timm's weight-standardised convolutions."""
    return isinstance(module, nn.Conv2d) and type(module).__name__ in _KINDS


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


def make_readers_plain_(model: nn.Module, tensors: Iterable[str]) -> None:
    """As `make_plain_`, for those of the layers with these weights that are standardised."""
    names = {tensor.rpartition(".")[0] for tensor in tensors}
    make_plain_(model, sorted(name for name in names if is_standardised(model.get_submodule(name))))


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


def _plain_class(module: nn.Module) -> type[nn.Conv2d]:
    if getattr(module, "same_pad", False):
        from timm.layers.conv2d_same import Conv2dSame  # there is such a module, so timm is there

        return Conv2dSame
    return nn.Conv2d
