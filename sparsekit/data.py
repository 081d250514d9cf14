"""Images with labels: opening, splitting, transforming and batching them.

timm finds the images (folders, tars) and transforms them. Reading is done here, because timm's datasets skip
an image they cannot read, and a silently different data set is worse than a stop.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_factory import create_reader
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler

from sparsekit.errors import DataError
from sparsekit.models import InputConfig

Picture = Image.Image
Labels = NDArray[np.int64]

_SYNONYMS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
_TENSOR_CACHE_BYTES = 256 * 2**20


class UnreadableImageError(DataError):
    """One image cannot be read; the message names its file.

    A DataLoader worker hands over an exception as the text of its traceback and builds the exception again
    from that text; the constructor takes the message out of it, so users see one line whatever the number of
    workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("UnreadableImageError: ", 1)[-1].strip())


@dataclass(frozen=True, eq=False)
class Images(Dataset[tuple[Picture, int]]):
    """Decoded images with their labels, read on demand.

    read(i) gives the picture of index i, where(i) its name for messages; `indices` (n,) are those that
    belong to this data set and `labels` (n,) their classes. in_memory: reading costs nothing.
    """

    read: Callable[[int], Picture]
    where: Callable[[int], str]
    indices: Labels
    labels: Labels
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Picture, int]:
        index = int(self.indices[position])
        try:
            return self.read(index), int(self.labels[position])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UnreadableImageError(
                f"cannot read the image {self.where(index)} ({reason}). Repair or remove it."
            ) from error

    def subset(self, positions: Labels) -> Images:
        """The images at `positions`, in that order."""
        return Images(self.read, self.where, self.indices[positions], self.labels[positions], self.in_memory)


@dataclass(frozen=True)
class ImageData:
    """Three data sets without a common image: for training, for every choice, and for the final figure."""

    train: Images
    validation: Images
    test: Images
    class_names: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Augment:
    """Random changes of training images.

    scale: share of the area a crop keeps; ratio: its width / height; hflip, vflip, random_erase:
    probabilities; color_jitter: strength; auto_augment: a timm string such as "rand-m9-mstd0.5".
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erase: float = 0.0


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
    seed: int = 0,
) -> ImageData:
    """Open a data set by name and split it.

    name: "digits" (1,797 embedded 8x8 digits), "folder" (class folders, or a tar of them, below `root`), or
    a timm name such as "torch/cifar10" or "hfds/...", already downloaded to `root`. train, validation, test
    name splits: for "folder" a folder or tar below `root` ("train" also finds "train.tar"; "" is `root`
    itself). Where validation or test is None, that share of train is set aside, class by class, by `seed`.
    limits: at most so many images of train, validation, test, class by class. Raises DataError.
    """
    splits = (train, validation, test)
    named = [split for split in splits if split is not None]
    if name == "digits":
        if len(named) > 1:
            raise DataError(f"digits has only one split; leave validation and test out, got {splits[1:]}.")
        opened = [_open_digits()]
    else:
        if root is None:
            raise DataError(f"data {name!r} needs root, the folder it lies in.")
        opened = [_open_folder(root, s) if name == "folder" else _open_timm(name, root, s) for s in named]
    class_names = _common_classes(_named(name, root), named, [names for _, names in opened])
    _refuse_same(named, [images for images, _ in opened])
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
        description=f"{_named(name, root)}, {len(class_names)} classes: {counts} images",
    )


def _named(name: str, root: Path | None) -> str:
    return f"{name} {root}" if root is not None else name


def _common_classes(data: str, splits: Sequence[str], names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    if len(names[0]) < 2:
        raise DataError(
            f"data {data}: split {splits[0]!r} has one class only ({names[0][0]!r}). "
            "Put the images of each class in a folder of its own: root/train/cat/1.jpg, root/train/dog/2.jpg."
        )
    for split, other in zip(splits[1:], names[1:], strict=True):
        if other != names[0]:
            lacks = sorted(set(names[0]) - set(other))[:5]
            more = sorted(set(other) - set(names[0]))[:5]
            raise DataError(
                f"data {data}: split {split!r} must have the same classes as {splits[0]!r}; "
                f"it lacks {lacks or 'none'} and has besides {more or 'none'}."
            )
    return names[0]


def _refuse_same(names: Sequence[str], parts: Sequence[Images]) -> None:
    # Compared by content: "val" and "validation", or "val" and "test" of torch/cifar10, name the same images.
    for (name, images), (other_name, other) in combinations(zip(names, parts, strict=True), 2):
        if np.array_equal(images.labels, other.labels) and images[0][0] == other[0][0]:
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


def fingerprint(data: ImageData) -> str:
    """A hash of which images, by name and label, are in which split: it changes when the splits do."""
    digest = hashlib.sha256()
    for images in (data.train, data.validation, data.test):
        for index, label in zip(images.indices, images.labels, strict=True):
            digest.update(f"{images.where(index)}\0{label}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _set_aside(images: Images, share: float, total: int, rng: np.random.Generator) -> tuple[Images, Images]:
    """Part `images` into round(share x total) of them and the rest."""
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
    """`count` sorted positions, each class in proportion (largest remainders get the odd ones)."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    quota = np.floor(exact).astype(np.int64)
    odd = np.argsort(quota - exact, kind="stable")[: count - int(quota.sum())]
    quota[odd] += 1
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:q] for c, q in zip(classes, quota, strict=True)]
    return np.sort(np.concatenate(chosen))


def _open_digits() -> tuple[Images, tuple[str, ...]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    labels = digits.target.astype(np.int64)
    images = Images(
        partial(_item, pictures), partial(_numbered, "digits"), np.arange(len(labels)), labels, True
    )
    return images, tuple(str(digit) for digit in range(10))


def _item(pictures: Sequence[Picture], index: int) -> Picture:
    return pictures[index]


def _numbered(name: str, index: int) -> str:
    return f"{index} of {name}"


@dataclass(frozen=True)
class _Stored:
    """Where the bytes of one image lie: in a file of its own (size -1) or inside a tar."""

    file: str
    offset: int
    size: int
    name: str


def _read_stored(places: Sequence[_Stored], index: int) -> Picture:
    # Opened anew for each image: worker processes that shared one open tar would move each other's file
    # position.
    place = places[index]
    with open(place.file, "rb") as file:
        file.seek(place.offset)
        content = file.read(place.size)
    return _decode(io.BytesIO(content))


def _decode(file: Any) -> Picture:
    image: Picture = Image.open(file)
    image.load()
    return image


def _name_stored(places: Sequence[_Stored], index: int) -> str:
    place = places[index]
    return place.file if place.size < 0 else f"{place.name} in {place.file}"


def _open_folder(root: Path, split: str) -> tuple[Images, tuple[str, ...]]:
    path = _find_split(root, split)
    is_tar = path.is_file()
    try:
        # timm would keep the index of a large tar in a pickle beside it.
        reader: Any = create_reader("", root=str(path), cache_tarinfo=False if is_tar else None)
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise DataError(
            f"no images found in {path} ({error}). It must hold a folder of images for each class: "
            f"{path.name}/cat/1.jpg, {path.name}/dog/2.jpg."
        ) from error
    except Exception as error:
        raise DataError(f"{path} cannot be read as a tar of class folders ({error}).") from error
    classes = reader.class_name_to_idx if is_tar else reader.class_to_idx
    if "" in classes:
        raise DataError(
            f"images lie directly in {path}, outside class folders. Move each into the folder of its class."
        )
    if is_tar:
        places = [_place_in_tar(str(path), tarinfo, child) for tarinfo, _, child in reader.samples]
        labels = np.asarray(reader.targets, dtype=np.int64)
    else:
        places = [_Stored(file, 0, -1, file) for file, _ in reader.samples]
        labels = np.array([label for _, label in reader.samples], dtype=np.int64)
    images = Images(
        partial(_read_stored, places), partial(_name_stored, places), np.arange(len(labels)), labels
    )
    return images, tuple(sorted(classes, key=classes.__getitem__))


def _place_in_tar(file: str, member: Any, child: Any) -> _Stored:
    # A tar inside the tar: its members count their offsets from its own start.
    start = 0 if child is None else child.offset_data
    name = member.name if child is None else f"{child.name}/{member.name}"
    return _Stored(file, start + member.offset_data, member.size, name)


def _find_split(root: Path, split: str) -> Path:
    if not root.exists():
        raise DataError(f"the data folder {root} does not exist (working directory: {Path.cwd()}).")
    if split in ("", "."):
        return root
    synonyms = next((names for names in _SYNONYMS.values() if split in names), (split,))
    for candidate in (split, *synonyms):
        for path in (root / candidate, root / f"{candidate}.tar"):
            if path.exists():
                return path
    there = sorted(os.listdir(root))[:8] if root.is_dir() else []
    raise DataError(
        f"{root} has no {split!r} and no '{split}.tar'; it holds {', '.join(there) or 'nothing'}. "
        "Name one of these as the split, or '' if the class folders lie in it directly."
    )


def _open_timm(name: str, root: Path, split: str) -> tuple[Images, tuple[str, ...]]:
    if name.lower().startswith(("wds/", "tfds/", "hfids/")):
        raise DataError(
            f"data {name!r} is a stream; give one that can be split and indexed: torch/..., hfds/..."
        )
    try:
        source: Any = create_dataset(name, root=str(root), split=split, download=False)
    except ImportError as error:
        raise DataError(f"data {name!r} needs a package that is not installed ({error}).") from error
    except Exception as error:
        raise DataError(
            f"data {name!r}, split {split!r}, cannot be opened in {root} ({error}). "
            "Download it there first, or check the name."
        ) from error
    reader = getattr(source, "reader", None)
    labels = np.array(_source_labels(source, reader), dtype=np.int64)
    names = _source_classes(source, reader) or tuple(str(c) for c in range(int(labels.max(initial=-1)) + 1))
    if len(labels) == 0:
        raise DataError(f"data {name!r}, split {split!r}, has no images.")
    read = partial(_read_source, source) if reader is None else partial(_read_reader, reader)
    return Images(read, partial(_numbered, f"{name}, split {split}"), np.arange(len(labels)), labels), names


def _source_labels(source: Any, reader: Any) -> list[int]:
    if reader is not None:
        return [int(label) for label in reader.iter_targets()]
    targets = getattr(source, "targets", None)
    return (
        [int(t) for t in targets] if targets is not None else [int(source[i][1]) for i in range(len(source))]
    )


def _source_classes(source: Any, reader: Any) -> tuple[str, ...]:
    if reader is None:
        # ImageNet names a class by a tuple of synonyms.
        return tuple(c if isinstance(c, str) else c[0] for c in getattr(source, "classes", ()))
    classes = getattr(reader, "class_to_idx", None) or {}
    return tuple(sorted(classes, key=classes.__getitem__))


def _read_source(source: Any, index: int) -> Picture:
    image: Picture = source[index][0]
    return image


def _read_reader(reader: Any, index: int) -> Picture:
    with reader[index][0] as file:
        return _decode(file)


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
    """Batches of (images float32 (n, c, h, w), normalised; labels int64 (n,)).

    training: shuffled anew at each iteration by the global torch random state (seed it before an epoch to
    repeat the epoch), and the last incomplete batch is left out unless it is the only one (BatchNorm cannot
    train on one image). `augment` applies to training only; None means images as in evaluation. `dataset`
    gives (PIL image, int).
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


@dataclass(frozen=True)
class _Shuffle(Sampler[int]):
    """A new random order at each iteration, from one draw of the global torch random state.

    torch's RandomSampler does the same, but accelerate gives that one a generator of its own in a run of
    several processes, and its state would have to be stored to repeat an epoch.
    """

    size: int

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        yield from torch.randperm(self.size, generator=generator).tolist()


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
