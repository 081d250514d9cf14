"""Layer norms that lose channels: they count those that are gone as zeros, so that zero channels go exactly."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.errors import InputError

# Names under which a norm keeps what is added to the variance.
_EPSILONS = ("eps", "epsilon", "variance_epsilon")
# Tokens, maps, sequences and volumes of n channels, as (shape before the channels, shape behind them).
_SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 3), ()),
    ((2,), (3, 2)),
    ((2,), (5,)),
    ((2,), (3, 2, 2)),
    ((2, 3, 4), ()),
    ((3,), ()),
)


@dataclass(frozen=True)
class LayerNormForm:
    """How a module computes a layer norm: over which dimension (-1 or 1), with which parameters and epsilon."""

    dim: int
    scale: str
    shift: str | None
    eps: float


class ZeroPaddedLayerNorm(nn.Module):
    """A layer norm over `dense_width` channels along `norm_dim`, of which all but those it is given are zero.

    With x the k channels that are left of n, mean = sum of x / n and variance = (sum of (x - mean)^2 + (n - k) mean^2)
    / n: each channel that is gone adds mean^2. The sums are torch's own, over x and n - k zeros behind it.
    """

    dense_width: int
    norm_dim: int
    norm_scale: str
    norm_shift: str | None
    norm_eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, in the shape it has."""
        scale = getattr(self, self.norm_scale).flatten()
        shift = None if self.norm_shift is None else getattr(self, self.norm_shift).flatten()
        kept = len(scale)
        zeros = (0, self.dense_width - kept)
        rows = F.pad(x.movedim(self.norm_dim, -1), zeros)
        shift = None if shift is None else F.pad(shift, zeros)
        normed = F.layer_norm(rows, (self.dense_width,), F.pad(scale, zeros), shift, self.norm_eps)
        return normed[..., :kept].movedim(-1, self.norm_dim).contiguous()


def layer_norm_form(module: nn.Module) -> LayerNormForm | None:
    """How a module computes a layer norm over its channels; None if it does not, or has no scale that a cut changes.

    It is seen, not read off the class: a copy with random parameters is run on random inputs.
    """
    if isinstance(module, ZeroPaddedLayerNorm):
        return LayerNormForm(module.norm_dim, module.norm_scale, module.norm_shift, module.norm_eps)
    own = dict(module.named_parameters(recurse=False))
    eps = next((v for v in (getattr(module, name, None) for name in _EPSILONS) if isinstance(v, float)), None)
    vectors = all(max(p.shape, default=0) == p.numel() > 1 for p in own.values())
    sizes = {parameter.numel() for parameter in own.values()}
    buffers = next(module.buffers(), None)
    if eps is None or not vectors or len(sizes) != 1 or len(own) > 2 or buffers is not None:
        return None
    if next(module.children(), None) is not None:
        return None
    return _seen_form(module, list(own), sizes.pop(), eps)


def _seen_form(module: nn.Module, names: list[str], n: int, eps: float) -> LayerNormForm | None:
    try:
        trial = copy.deepcopy(module).cpu().double().eval()
    except Exception:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters(recurse=False):
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    orders = [names, names[::-1]] if len(names) == 2 else [[*names, None]]
    forms: set[LayerNormForm | None] = set()
    for sizes in _SHAPES:
        # No other size may be n: a norm over this dimension would pass for one over the channels.
        before, behind = ([size + n * (size == n) for size in some] for some in sizes)
        x = torch.randn(*before, n, *behind, generator=generator, dtype=torch.float64)
        if len(before) + len(behind) == 1 and forms:
            continue  # a matrix does not tell norms of tokens from norms of maps
        try:
            with torch.no_grad():
                found = type(module).forward(trial, x)
        except Exception:
            continue
        dim = -1 if not behind else len(before)
        tried = (LayerNormForm(dim, str(scale), shift, eps) for scale, shift in orders)
        forms.add(next((form for form in tried if _agrees(found, _normed(trial, form, x))), None))
    return forms.pop() if len(forms) == 1 else None


def _normed(module: nn.Module, form: LayerNormForm, x: Tensor) -> Tensor:
    scale, shift = (
        None if name is None else getattr(module, name).flatten() for name in (form.scale, form.shift)
    )
    rows = x.movedim(form.dim, -1)
    return F.layer_norm(rows, rows.shape[-1:], scale, shift, form.eps).movedim(-1, form.dim)


def _agrees(found: Any, expected: Tensor) -> bool:
    # Some norms compute in float32 whatever they are given.
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    )


def count_zeros_(module: Any, dense_width: int) -> None:
    """Turn a layer norm into one over `dense_width` channels, of which those it lacks are zero; in place.

    One that counts zeros already keeps its width. Raises InputError for a module that computes no layer norm.
    """
    if isinstance(module, ZeroPaddedLayerNorm):
        return
    form = layer_norm_form(module)
    if form is None:
        raise InputError(f"{type(module).__name__} computes no layer norm whose channels can go")
    vars(module).pop("forward", None)
    module.__class__ = ZeroPaddedLayerNorm
    module.dense_width, module.norm_dim, module.norm_eps = dense_width, form.dim, form.eps
    module.norm_scale, module.norm_shift = form.scale, form.shift


def zeros_counted(model: nn.Module) -> dict[str, int]:
    """The dense widths of the layer norms that count zeros, by name."""
    modules = model.named_modules()
    return {name: module.dense_width for name, module in modules if isinstance(module, ZeroPaddedLayerNorm)}
