"""Images as people have them: a tensor, batches, or a loader with labels that nobody needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsekit.errors import DataError

FEWEST_IMAGES = 32


def collect_images(images: Any, *, most: int) -> Tensor:
    """Return up to `most` images, one along the first dimension, on the CPU.

    `images` is a tensor of them, or an iterable of batches: tensors, tuples or lists that begin with one (labels are
    left alone), or dictionaries with one under "pixel_values", "image", "images" or "input". Raises DataError if there
    are fewer than 32, if sizes differ, and for values that are not finite, not numbers, or all the same.
    """
    if most < FEWEST_IMAGES:
        raise DataError(f"max_images must be at least {FEWEST_IMAGES}, got {most}")
    found = images if isinstance(images, Tensor) else _joined(images, most)
    if found.dim() < 2:
        raise DataError(
            f"images must be a tensor with one image along its first dimension, got a tensor of shape "
            f"{tuple(found.shape)}"
        )
    if not found.is_floating_point():
        raise DataError(
            f"images must be floating-point numbers, normalised as the model expects them, got {found.dtype}"
        )
    if len(found) < FEWEST_IMAGES:
        raise DataError(
            f"{len(found)} images are too few to repair a model with; give at least {FEWEST_IMAGES}, better 500: "
            "labels are not needed"
        )
    found = found[:most].detach().cpu()
    if not bool(found.isfinite().all()):
        bad = int((~found.isfinite()).flatten(1).any(1).nonzero()[0, 0])
        raise DataError(f"image {bad} has values that are not finite numbers")
    if bool((found == found[:1]).all()):
        raise DataError("all images are the same; nothing can be learned from how the model answers to them")
    return found


def _joined(batches: Any, most: int) -> Tensor:
    if isinstance(batches, Dataset):
        raise DataError(
            "images must come in batches, got a Dataset; wrap it: DataLoader(dataset, batch_size=32, shuffle=True)"
        )
    if isinstance(batches, (str, bytes, dict)) or not isinstance(batches, Iterable):
        raise DataError(
            f"images must be a tensor, an iterable of batches or a DataLoader, got {type(batches).__name__}"
        )
    parts: list[Tensor] = []
    count = 0
    for batch in batches:
        part = _images_of(batch)
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise DataError(
                f"images differ in shape: {tuple(parts[0].shape[1:])}, and in batch {len(parts)} "
                f"{tuple(part.shape[1:])}"
            )
        parts.append(part.detach().cpu())
        count += len(part)
        if count >= most:
            break
    if not parts:
        raise DataError(
            "there are no images: the iterable gives no batch (a generator can be read only once)"
        )
    return torch.cat(parts)


def _images_of(batch: Any) -> Tensor:
    if isinstance(batch, dict):
        batch = next(
            (batch[key] for key in ("pixel_values", "image", "images", "input") if key in batch), None
        )
    while isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor) or batch.dim() < 2:
        raise DataError(
            "a batch must be a tensor of images, or a tuple that begins with one, got "
            + (
                f"a tensor of shape {tuple(batch.shape)}"
                if isinstance(batch, Tensor)
                else type(batch).__name__
            )
        )
    return batch
