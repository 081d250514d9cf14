"""Labels: which channel each element of a tensor belongs to, held only along the dimensions where that varies.

A label array has as many dimensions as the tensor it describes, with size 1 wherever the label is the same all
along. Its entries are the numbers of *atoms* (one index of one dimension of a parameter), or `FIXED` where an
element belongs to nothing that could go. Operators that move values move labels the same way: they are run on the
array, expanded (without a copy) to the tensor's shape. Entries are float32, the type that every moving operator takes;
whole numbers are exact in it up to 2^24, far more than any model has rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FIXED = 0


def span(labels: Tensor) -> tuple[int, ...]:
    """Dimensions along which the label varies."""
    return tuple(dim for dim, size in enumerate(labels.shape) if size > 1)


def compressed(labels: Tensor) -> Tensor:
    """The array cut down to size 1 along every dimension where it does not vary."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(dim, 0, 1)
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            # A look at the second slice spares the comparison of all in the usual case.
            if torch.equal(labels.narrow(dim, 1, 1), first) and bool((labels == first).all()):
                labels = first
    return labels


def moved(labels: Tensor, shape: Sequence[int], operator: Callable[[Tensor], Any]) -> list[Tensor]:
    """Labels of everything that `operator` makes of a tensor of this shape and these labels."""
    results = operator(labels.expand(tuple(shape)))
    results = [results] if isinstance(results, Tensor) else list(results)
    return [compressed(result) for result in results]


def aligned(labels: Tensor, n_dims: int) -> Tensor:
    """With leading dimensions of size 1, as broadcasting adds them."""
    return labels.reshape((1,) * (n_dims - labels.dim()) + labels.shape)


def along(labels: Tensor, dim: int, n_dims: int) -> Tensor:
    """A vector of labels laid along dimension `dim` of `n_dims`."""
    shape = [1] * n_dims
    shape[dim] = -1
    return labels.reshape(shape)


def merged_by_span(arrays: Sequence[Tensor], couple: Callable[[Tensor, Tensor], None]) -> tuple[Tensor, ...]:
    """One array for each set of dimensions; arrays over the same dimensions are coupled element by element."""
    by_span: dict[tuple[int, ...], Tensor] = {}
    for labels in arrays:
        dims = span(labels)
        if not dims:
            continue
        if dims in by_span:
            couple(by_span[dims], labels)
        else:
            by_span[dims] = labels
    return tuple(by_span.values())
