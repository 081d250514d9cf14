"""LayerNorm over the channels that stay: what a masked model computes where a cut takes channels out of a layer norm.

Its mean and variance run over all channels, so they change with a cut, even if what goes is zero: such a cut is not
lossless. The masked model stands for the cut one, so its layer norms look at the channels that stay alone, and what
goes comes out as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Attributes of the classes and modules made here.
_MARK, _KEPT = "_normalises_what_stays", "_kept"


def normalise_what_stays_(module: nn.Module, keep: tuple[int, ...]) -> None:
    """Give the module a subclass whose layer norms look at the channels `keep` only, in place."""
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


def _original_class(module: nn.Module) -> Any:
    """The module's class before its layer norms were confined to some channels."""
    cls = type(module)
    return cls.__bases__[0] if _MARK in vars(cls) else cls


class _OverWhatStays(TorchFunctionMode):
    """Layer norms with this scale see the kept channels of their input's last dimension, and give 0 for the others."""

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
    """Of torch's layer_norm, however they were given."""
    return input, normalized_shape, weight, bias, eps
