"""What a cut does to norms: layer norms, response norms, root mean square norms, and standardised convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsekit.structure.plan import TensorCut

# Attributes of the classes and modules made here.
_MARK, _KEPT = "_normalises_what_stays", "_kept"


_KINDS = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def normalise_what_stays_(module: nn.Module, keep: tuple[int, ...]) -> None:
    """Give the module a subclass whose layer norms look only at the channels `keep`, in place."""
    cls = _original_class(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _OverWhatStays(self.weight, getattr(self, _KEPT)):
            return cls.forward(self, *args, **kwargs)

    module.__class__ = type(cls.__name__, (cls,), {"forward": forward, _MARK: True})
    setattr(module, _KEPT, keep)


def normalise_all_(module: nn.Module) -> None:
    """Undo `normalise_what_stays_`, in place; any other module is left as it is."""
    if _MARK in vars(type(module)):
        module.__class__ = _original_class(module)
        delattr(module, _KEPT)


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


def _original_class(module: nn.Module) -> Any:
    """The module's class before its layer norms were confined to some channels."""
    cls = type(module)
    return cls.__bases__[0] if _MARK in vars(cls) else cls


class _OverWhatStays(TorchFunctionMode):
    """Layer norms with this scale normalise the kept channels of the last dimension, and give 0 for the others."""

    def __init__(self, weight: Tensor, keep: tuple[int, ...]) -> None:
        super().__init__()
        self._weight, self._keep = weight, torch.tensor(keep, device=weight.device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "layer_norm":
            return func(*args, **kwargs)
        x, shape, weight, bias, eps = _arguments(*args, **kwargs)
        if weight is None or weight.shape != self._weight.shape or tuple(shape) != tuple(weight.shape):
            return func(*args, **kwargs)
        some = [t if t is None else t.index_select(0, self._keep) for t in (weight, bias)]
        normed = func(x.index_select(-1, self._keep), (len(self._keep),), *some, eps)
        return torch.zeros_like(x, dtype=normed.dtype).index_copy(-1, self._keep, normed)


def _arguments(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, Any, Tensor | None, Tensor | None, float]:
    """The arguments of torch's layer_norm, however they were given."""
    return input, normalized_shape, weight, bias, eps


def _plain_class(module: nn.Module) -> type[nn.Conv2d]:
    if getattr(module, "same_pad", False):
        from timm.layers.conv2d_same import Conv2dSame  # there is such a module, so timm is there

        return Conv2dSame
    return nn.Conv2d
