"""Split a data set into training, validation and test images, drawn by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from sparsekit.errors import DataError
from sparsekit.training.data_sources import Images, Labels, open_digits, open_folder, open_timm


@dataclass(frozen=True)
class ImageData:
    """Three data sets without a common image: for training, for every choice, and for the final figure."""

    train: Images
    validation: Images
    test: Images
    class_names: tuple[str, ...]
    description: str


def open_data(
    name: str,
    *,
    root: Path | None = None,
    train: str = "train",
    validation: str | None = None,
    test: str | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    limits: tuple[int | None, int | None, int | None] = (None, None, None),
    labels: bool = True,
    seed: int = 0,
) -> ImageData:
    """Open a data set by name and split it.

    name: "digits" (1,797 embedded 8x8 digits), "folder" (class folders, or a tar of them, below `root`), or a timm name
    such as "torch/cifar10" or "hfds/...", already downloaded to `root`. train, validation, test: names of splits; for
    "folder" a folder or tar below `root` ("train" also finds "train.tar", "" is `root` itself). If validation or test
    is None, its share of train is set aside, drawn class by class by `seed`. limits: at most so many images of train,
    validation and test, drawn in the same way. labels: False leaves the labels out; images lie in any folders, their
    labels are all 0, and there are no class names. Raises DataError.
    """
    splits = (train, validation, test)
    named = [split for split in splits if split is not None]
    if name == "digits":
        if len(named) > 1:
            raise DataError(f"digits has only one split; leave validation and test out, got {splits[1:]}.")
        opened = [open_digits()]
    else:
        if root is None:
            raise DataError(f"data {name!r} needs root, the folder it lies in.")
        opened = [
            open_folder(root, s, labels=labels) if name == "folder" else open_timm(name, root, s)
            for s in named
        ]
    if labels:
        class_names = _common_classes(_named(name, root), named, [names for _, names in opened])
        kinds_of = f"{len(class_names)} classes"
    else:
        class_names, kinds_of = (), "no labels"
        opened = [(images.labelled(np.zeros(len(images), dtype=np.int64)), ()) for images, _ in opened]
    _refuse_same(named, [images for images, _ in opened], labels=labels)
    parts = dict(zip(named, (images for images, _ in opened), strict=True))
    rng = np.random.default_rng(seed)
    rest = parts[train]
    total = len(rest)
    test_images, rest = (parts[test], rest) if test is not None else _set_aside(rest, test_share, total, rng)
    validation_images, rest = (
        (parts[validation], rest)
        if validation is not None
        else _set_aside(rest, validation_share, total, rng)
    )
    limited = [_limit(i, n, rng) for i, n in zip((rest, validation_images, test_images), limits, strict=True)]
    kinds = ("train", "validation", "test")
    counts = ", ".join(f"{len(images):,} {kind}" for images, kind in zip(limited, kinds, strict=True))
    return ImageData(
        train=limited[0],
        validation=limited[1],
        test=limited[2],
        class_names=class_names,
        # It goes into reports, which are given away: a whole path would say who the person is.
        description=f"{_named(name, root and Path(root.resolve().name))}, {kinds_of}: {counts} images",
    )


def fingerprint(data: ImageData) -> str:
    """A hash of the names and labels of the images in each split: it changes when the splits do."""
    digest = hashlib.sha256()
    for images in (data.train, data.validation, data.test):
        for index, label in zip(images.indices, images.labels, strict=True):
            digest.update(f"{images.where(index)}\0{label}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _common_classes(data: str, splits: Sequence[str], names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    if len(names[0]) < 2:
        raise DataError(
            f"data {data}: split {splits[0]!r} has one class only ({names[0][0]!r}). "
            "Put the images of each class in a folder of its own: root/train/cat/1.jpg, root/train/dog/2.jpg; "
            "if there are no labels, set data.labels to false."
        )
    for split, other in zip(splits[1:], names[1:], strict=True):
        if other != names[0]:
            lacks = sorted(set(names[0]) - set(other))[:5]
            more = sorted(set(other) - set(names[0]))[:5]
            raise DataError(
                f"data {data}: split {split!r} must have the same classes as {splits[0]!r}; "
                f"it lacks {lacks or 'none'} and has {more or 'none'} in addition."
            )
    return names[0]


def _named(name: str, root: Path | None) -> str:
    return f"{name} {root}" if root is not None else name


def _refuse_same(names: Sequence[str], parts: Sequence[Images], *, labels: bool) -> None:
    # Compared by content: "val" and "validation", or "val" and "test" of torch/cifar10, name the same images. One image
    # says little where there are no labels.
    for (name, images), (other_name, other) in combinations(zip(names, parts, strict=True), 2):
        if labels and np.array_equal(images.labels, other.labels) and images[0][0] == other[0][0]:
            raise DataError(
                f"the splits {name!r} and {other_name!r} hold the same images; "
                "train, validation and test must differ. Leave one out to set a share of train aside."
            )
        shared = {images.where(i) for i in images.indices} & {other.where(i) for i in other.indices}
        if shared:
            raise DataError(
                f"the splits {name!r} and {other_name!r} share {len(shared)} images, among them {min(shared)}; "
                "a split must not lie inside another. Name folders or tars beside each other."
            )


def _set_aside(images: Images, share: float, total: int, rng: np.random.Generator) -> tuple[Images, Images]:
    """Split `images` into round(share x total) of them and the rest."""
    count = round(share * total)
    if not 0 < count < len(images):
        raise DataError(
            f"a share of {share} of {total} training images is {count}; "
            "set a share that leaves images on both sides."
        )
    chosen = _draw(images.labels, count, rng)
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    return images.subset(chosen), images.subset(rest)


def _limit(images: Images, count: int | None, rng: np.random.Generator) -> Images:
    if count is None or count >= len(images):
        return images
    return images.subset(_draw(images.labels, count, rng))


def _draw(labels: Labels, count: int, rng: np.random.Generator) -> Labels:
    """`count` random positions, sorted, each class in proportion; the largest remainders get the odd ones."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    quota = np.floor(exact).astype(np.int64)
    odd = np.argsort(quota - exact, kind="stable")[: count - int(quota.sum())]
    quota[odd] += 1
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:q] for c, q in zip(classes, quota, strict=True)]
    return np.sort(np.concatenate(chosen))
