"""Make batches: images are transformed, augmented in training, and put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler

from sparsekit.errors import DataError
from sparsekit.training.data_sources import Picture
from sparsekit.training.models import InputConfig

_TENSOR_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Augment:
    """Random changes to training images.

    scale: share of the area that a crop keeps. ratio: its width over its height. hflip, vflip, random_erase:
    probabilities. color_jitter: strength. auto_augment: a timm policy such as "rand-m9-mstd0.5".
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erase: float = 0.0


def make_loader(
    dataset: Dataset[tuple[Picture, int]],
    config: InputConfig,
    *,
    training: bool,
    batch_size: int,
    workers: int = 0,
    augment: Augment | None = None,
    pin_memory: bool = False,
) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images, float32 (n, c, h, w), normalised, and labels, int64 (n,).

    `dataset` gives (PIL image, int). In training, images are shuffled anew at each iteration by the global torch random
    state: seed it before an epoch to repeat the epoch. The last batch is left out if it is incomplete, unless it is the
    only one, because BatchNorm cannot train on one image. `augment` applies to training only; None transforms images
    as in evaluation. Raises DataError.
    """
    channels = config.input_size[0]
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, but the model takes {channels}.")
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise DataError("the data set is empty.")
    random = training and augment is not None
    transform = (
        _training_transform(config, augment) if training and augment else _evaluation_transform(config)
    )
    items: Any = _Transformed(dataset, transform, "L" if channels == 1 else "RGB")
    n_bytes = 4 * len(dataset) * int(np.prod(config.input_size))
    if not random and getattr(dataset, "in_memory", False) and n_bytes <= _TENSOR_CACHE_BYTES:
        items = [items[i] for i in range(len(dataset))]
    return DataLoader(
        items,
        batch_size=batch_size,
        sampler=_Shuffle(len(dataset)) if training else None,
        num_workers=workers,
        drop_last=training and len(dataset) > batch_size,
        pin_memory=pin_memory,
    )


def _training_transform(config: InputConfig, augment: Augment) -> Callable[[Picture], torch.Tensor]:
    try:
        transform: Callable[[Picture], torch.Tensor] = create_transform(
            config.input_size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # None switches it off
            auto_augment=augment.auto_augment,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            re_prob=augment.random_erase,
        )
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"these augmentations cannot be made: {augment} ({error!r}).") from error
    return transform


def _evaluation_transform(config: InputConfig) -> Callable[[Picture], torch.Tensor]:
    transform: Callable[[Picture], torch.Tensor] = create_transform(
        config.input_size,
        is_training=False,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
    )
    return transform


@dataclass(frozen=True, eq=False)
class _Transformed(Dataset[tuple[torch.Tensor, int]]):
    images: Dataset[tuple[Picture, int]]
    transform: Callable[[Picture], torch.Tensor]
    mode: str

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return self.transform(_convert(image, self.mode)), label


def _convert(image: Picture, mode: str) -> Picture:
    if image.mode.startswith("I;16"):
        # PIL would clip 16-bit grey values at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


@dataclass(frozen=True)
class _Shuffle(Sampler[int]):
    """A new random order at each iteration, from one draw of the global torch random state.

    torch's RandomSampler does the same. But in a run of several processes accelerate gives that one a generator of its
    own, whose state would have to be stored to repeat an epoch.
    """

    size: int

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        yield from torch.randperm(self.size, generator=generator).tolist()
