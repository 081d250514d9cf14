"""Labels: which atom each element of a tensor belongs to, kept only along the dimensions where that varies.

A label array has the dimensions of the tensor it describes, with size 1 where the label does not vary. Its entries
are atoms (see `observations`), or `FIXED` where an element belongs to nothing that could go. Labels move as values
do: an operator that moves values is run on the labels, expanded to the tensor's shape without a copy. Entries are
float32, which every moving operator takes; whole numbers are exact in it up to 2^24, far more than any model has rows
and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FIXED = 0


def span(labels: Tensor) -> tuple[int, ...]:
    """The dimensions along which the labels vary."""
    return tuple(dim for dim, size in enumerate(labels.shape) if size > 1)


def compressed(labels: Tensor) -> Tensor:
    """The labels with size 1 along every dimension where they do not vary."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(dim, 0, 1)
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            # Usually the second slice differs already, and the others need not be compared.
            if torch.equal(labels.narrow(dim, 1, 1), first) and bool((labels == first).all()):
                labels = first
    return labels


def moved(labels: Tensor, shape: Sequence[int], operator: Callable[[Tensor], Any]) -> list[Tensor]:
    """The labels of each result of `operator`, run on a tensor of this shape and these labels."""
    results = operator(labels.expand(tuple(shape)))
    results = [results] if isinstance(results, Tensor) else list(results)
    return [compressed(result) for result in results]


def aligned(labels: Tensor, n_dims: int) -> Tensor:
    """The labels with leading dimensions of size 1, as broadcasting adds them."""
    return labels.reshape((1,) * (n_dims - labels.dim()) + labels.shape)


def along(labels: Tensor, dim: int, n_dims: int) -> Tensor:
    """A vector of labels, laid along dimension `dim` of `n_dims`."""
    shape = [1] * n_dims
    shape[dim] = -1
    return labels.reshape(shape)


def divided(labels: Tensor, dim: int, n_parts: int) -> Tensor:
    """The labels with dimension `dim` in two: parts, and places in a part."""
    return labels.reshape(*labels.shape[:dim], n_parts, -1, *labels.shape[dim + 1 :])


def merged_by_span(arrays: Sequence[Tensor], couple: Callable[[Tensor, Tensor], None]) -> tuple[Tensor, ...]:
    """One array for each span; arrays of the same span are coupled element by element."""
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
