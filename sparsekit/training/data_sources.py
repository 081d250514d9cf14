"""Open images: the embedded digits, folders and tars, and timm's datasets.

timm finds the images, but they are read here: timm's datasets skip an image that they cannot read, and a data set that
silently differs is worse than a stop.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_factory import create_reader
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

from sparsekit.errors import DataError, first_line

Picture = Image.Image
# Pillow knows many more, and opens a file as what it holds, whatever its name: for EPS it starts Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
Labels = NDArray[np.int64]
_SYNONYMS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}


class UnreadableImageError(DataError):
    """One image cannot be read; the message names its file.

    A DataLoader's worker hands over only the text of the traceback, and the exception is built again from that. So the
    constructor takes the message out of a traceback, and users see one line whatever the number of workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("UnreadableImageError: ", 1)[-1].strip())


@dataclass(frozen=True, eq=False)
class Images(Dataset[tuple[Picture, int]]):
    """Images with their labels, read on demand.

    indices, labels: (n,), which images of the source these are, and their classes. read, where: give the picture of an
    index, and its name for messages. in_memory: reading costs nothing.
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
            raise UnreadableImageError(
                f"cannot read the image {self.where(index)} ({first_line(error)}). Repair or remove it."
            ) from error

    def subset(self, positions: Labels) -> Images:
        """The images at `positions`, in that order."""
        return replace(self, indices=self.indices[positions], labels=self.labels[positions])

    def labelled(self, labels: Labels) -> Images:
        """The same images with other labels, (n,)."""
        return replace(self, labels=labels)


def open_digits() -> tuple[Images, tuple[str, ...]]:
    """The 1,797 handwritten digits of scikit-learn (8x8 pixels), and the names of their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    labels = digits.target.astype(np.int64)
    images = Images(
        partial(_item, pictures), partial(_numbered, "digits"), np.arange(len(labels)), labels, True
    )
    return images, tuple(str(digit) for digit in range(10))


def open_folder(root: Path, split: str, *, labels: bool = True) -> tuple[Images, tuple[str, ...]]:
    """A split below `root`, a folder or tar of class folders, and the names of its classes. Raises DataError.

    Without `labels` the images may lie in any folders, and the labels say nothing.
    """
    path = _find_split(root, split)
    is_tar = path.is_file()
    try:
        # timm would keep the index of a large tar in a pickle beside it.
        reader: Any = create_reader("", root=str(path), cache_tarinfo=False if is_tar else None)
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        layout = f"a folder of images for each class: {path.name}/cat/1.jpg, {path.name}/dog/2.jpg"
        raise DataError(
            f"no images found in {path} ({error}). It must hold {layout if labels else 'images'}."
        ) from error
    except Exception as error:
        raise DataError(f"{path} cannot be read as a tar of images ({error}).") from error
    classes = reader.class_name_to_idx if is_tar else reader.class_to_idx
    if labels and "" in classes:
        raise DataError(
            f"images lie directly in {path}, outside class folders. Move each into the folder of its class; "
            "if there are no labels, set data.labels to false."
        )
    if is_tar:
        places = [_place_in_tar(str(path), tarinfo, child) for tarinfo, _, child in reader.samples]
        targets = np.asarray(reader.targets, dtype=np.int64)
    else:
        places = [_Stored(file, 0, -1, file) for file, _ in reader.samples]
        targets = np.array([label for _, label in reader.samples], dtype=np.int64)
    images = Images(
        partial(_read_stored, places), partial(_name_stored, places), np.arange(len(targets)), targets
    )
    return images, tuple(sorted(classes, key=classes.__getitem__))


def open_timm(name: str, root: Path, split: str) -> tuple[Images, tuple[str, ...]]:
    """A split of a timm dataset downloaded to `root`, and the names of its classes. Raises DataError."""
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
    if isinstance(source, DatasetFolder):
        source.loader = _decode
    reader = getattr(source, "reader", None)
    labels = np.array(_source_labels(source, reader), dtype=np.int64)
    names = _source_classes(source, reader) or tuple(str(c) for c in range(int(labels.max(initial=-1)) + 1))
    if len(labels) == 0:
        raise DataError(f"data {name!r}, split {split!r}, has no images.")
    read = partial(_read_source, source) if reader is None else partial(_read_reader, reader)
    return Images(read, partial(_numbered, f"{name}, split {split}"), np.arange(len(labels)), labels), names


def _item(pictures: Sequence[Picture], index: int) -> Picture:
    return pictures[index]


def _numbered(name: str, index: int) -> str:
    return f"{index} of {name}"


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


@dataclass(frozen=True)
class _Stored:
    """Where the bytes of one image lie: in a file of its own (size -1), or in a tar."""

    file: str
    offset: int
    size: int
    name: str


def _place_in_tar(file: str, member: Any, child: Any) -> _Stored:
    # The offsets of members of a tar inside the tar count from its own start.
    start = 0 if child is None else child.offset_data
    name = member.name if child is None else f"{child.name}/{member.name}"
    return _Stored(file, start + member.offset_data, member.size, name)


def _read_stored(places: Sequence[_Stored], index: int) -> Picture:
    # Opened anew for each image: workers that shared one open tar would move each other's position in it.
    place = places[index]
    with open(place.file, "rb") as file:
        file.seek(place.offset)
        content = file.read(place.size)
    return _decode(io.BytesIO(content))


def _decode(file: Any) -> Picture:
    image: Picture = Image.open(file, formats=IMAGE_FORMATS)
    image.load()
    return image


def _name_stored(places: Sequence[_Stored], index: int) -> str:
    place = places[index]
    return place.file if place.size < 0 else f"{place.name} in {place.file}"


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
