from __future__ import annotations

import io
import random
import subprocess
import tarfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sparsekit.errors import DataError
from sparsekit.training.data_sources import Images
from sparsekit.training.loader import Augment, make_loader
from sparsekit.training.models import InputConfig
from sparsekit.training.splits import ImageData, open_data

CONFIG = InputConfig((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)


def png(value: int, size: int = 8, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 255 - value, value // 2)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def class_files(classes: str = "ab", n: int = 5, first: int = 0) -> dict[str, bytes]:
    files = {f"{c}/{i}.png": png(first + 10 * k + i) for k, c in enumerate(classes) for i in range(n)}
    return {name: files[name] for name in sorted(files)}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def identities(images: Images) -> set[int]:
    return set(images.indices.tolist())


def pixels(images: Images) -> set[bytes]:
    return {images[i][0].tobytes() for i in range(len(images))}


def digits(**arguments: object) -> ImageData:
    defaults = {"validation_share": 200 / 1797, "test_share": 400 / 1797, "seed": 0}
    return open_data("digits", **{**defaults, **arguments})  # type: ignore[arg-type]


def test_digits_are_split_without_overlap_class_by_class() -> None:
    data = digits()
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [1197, 200, 400]
    assert len(set.union(*map(identities, parts))) == 1797
    assert data.class_names == tuple("0123456789")
    for part in parts:
        counts = np.bincount(part.labels, minlength=10)
        whole = np.bincount(load_digits().target)
        assert np.abs(counts / len(part) - whole / 1797).max() <= 1.5 / len(part)
    image, label = data.train[0]
    assert (image.size, image.mode, type(label)) == ((8, 8), "L", int)
    assert max(np.asarray(data.train[i][0]).max() for i in range(9)) == 255


def test_labels_belong_to_their_digits() -> None:
    expected = load_digits().target
    for part in (digits().train, digits().test):
        assert np.array_equal(part.labels, expected[part.indices])


def test_the_seed_decides_the_split() -> None:
    assert identities(digits().test) == identities(digits().test)
    assert identities(digits().test) != identities(digits(seed=1).test)


def test_limits_keep_the_classes_balanced_and_the_test_images_apart() -> None:
    data = digits(limits=(100, 20, None))
    assert [len(data.train), len(data.validation), len(data.test)] == [100, 20, 400]
    assert set(Counter(data.train.labels.tolist()).values()) <= {9, 10, 11}
    assert not identities(data.train) & identities(data.validation)
    assert identities(data.test) == identities(digits().test)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_must_leave_images_on_both_sides(share: float) -> None:
    with pytest.raises(DataError, match="share"):
        digits(test_share=share)


@pytest.mark.parametrize("kind", ["folder", "tar", "named tar"])
def test_folder_and_tar_give_the_same_images(tmp_path: Path, kind: str) -> None:
    for split, first in (("train", 0), ("val", 100)):
        files = class_files(first=first)
        if kind == "folder":
            write_folder(tmp_path / split, files)
        else:
            write_tar(tmp_path / f"{'x_' if kind == 'named tar' else ''}{split}.tar", files)
    names = ("x_train.tar", "x_val.tar") if kind == "named tar" else ("train", "validation")
    data = open_data("folder", root=tmp_path, train=names[0], validation=names[1], test_share=0.2)
    assert data.class_names == ("a", "b")
    assert [len(data.train), len(data.validation), len(data.test)] == [8, 10, 2]
    assert not pixels(data.train) & pixels(data.test)
    for part, first in ((data.train, 0), (data.validation, 100)):
        for i in range(len(part)):
            image, label = part[i]
            assert image.getpixel((0, 0))[0] - first in range(10 * label, 10 * label + 5)


def test_class_folders_directly_in_root_and_tars_in_a_tar(tmp_path: Path) -> None:
    data = open_data("folder", root=write_folder(tmp_path / "x", class_files()), train="", test_share=0.3)
    assert len(data.train) + len(data.validation) + len(data.test) == 10
    inner = {c: write_tar(tmp_path / f"{c}.tar", {f"{i}.png": png(i) for i in range(4)}) for c in "ab"}
    outer = write_tar(tmp_path / "outer.tar", {f"{c}.tar": path.read_bytes() for c, path in inner.items()})
    nested = open_data("folder", root=outer, train="", validation_share=0.25, test_share=0.25)
    assert nested.class_names == ("a", "b")
    assert {nested.train[i][0].getpixel((0, 0))[0] for i in range(4)} <= set(range(4))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_without_labels_images_lie_in_any_folders(tmp_path: Path, kind: str) -> None:
    files = {
        f"{folder}{i}.png": png(10 * k + i) for k, folder in enumerate(("", "a/", "b/c/")) for i in range(4)
    }
    root = tmp_path if kind == "folder" else tmp_path / "photos.tar"
    (write_folder if kind == "folder" else write_tar)(root, files)
    data = open_data("folder", root=root, train="", labels=False, validation_share=0.25, test_share=0.25)
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [6, 3, 3]
    assert len(set.union(*map(pixels, parts))) == 12
    assert not any(part.labels.any() for part in parts)
    assert data.class_names == ()
    assert "no labels" in data.description


def test_user_mistakes_with_folders(tmp_path: Path) -> None:
    def error(pattern: str, root: Path = tmp_path, **arguments: str) -> None:
        with pytest.raises(DataError, match=pattern):
            open_data("folder", root=root, **arguments)  # type: ignore[arg-type]

    error("nowhere does not exist", root=tmp_path / "nowhere")
    write_folder(tmp_path / "train", class_files("ab"))
    error(r"has no 'trian' and no 'trian.tar'; it holds train", train="trian")
    error("hold the same images", validation="training")
    (tmp_path / "empty").mkdir()
    error("no images found in .*empty", train="empty")
    write_tar(tmp_path / "none.tar", {"a/readme.txt": b"x"})
    error(r"no images found in .*none\.tar", train="none")
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    error(r"bad\.tar cannot be read", train="bad")
    write_folder(tmp_path / "one", class_files("a"))
    error("'one' has one class only", train="one")
    write_folder(tmp_path / "other", class_files("ac"))
    error(r"'other' must have the same classes as 'train'; it lacks \['b'\] .* \['c'\]", validation="other")
    write_folder(tmp_path / "flat", {"1.png": png(1), "2.png": png(2)})
    error("directly in .*flat.*set data.labels to false", train="flat")
    with pytest.raises(DataError, match=r"no images found in .*empty .*It must hold images\."):
        open_data("folder", root=tmp_path, train="empty", labels=False)
    with pytest.raises(DataError, match="needs root"):
        open_data("folder")


def test_timm_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"torch/cifar10.*cannot be opened"):
        open_data("torch/cifar10", root=tmp_path)
    with pytest.raises(DataError, match=r"torch/nonsense.*cannot be opened"):
        open_data("torch/nonsense", root=tmp_path)
    with pytest.raises(DataError, match="stream"):
        open_data("wds/imagenet", root=tmp_path)
    write_folder(tmp_path / "train", class_files())
    data = open_data("torch/image_folder", root=tmp_path, test_share=0.2, validation_share=0.2)
    assert data.class_names == ("a", "b")
    assert [len(data.train), len(data.validation), len(data.test)] == [6, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("broken", [b"no image", png(1)[:45], b""], ids=["text", "truncated", "empty"])
def test_a_corrupt_image_is_named(tmp_path: Path, workers: int, kind: str, broken: bytes) -> None:
    files = class_files() | {"b/2.png": broken}
    if kind == "folder":
        write_folder(tmp_path / "train", files)
    else:
        write_tar(tmp_path / "train.tar", files)
    data = open_data("folder", root=tmp_path, validation_share=0.2, test_share=0.2)
    everything = Images(data.train.read, data.train.where, np.arange(10), np.repeat([0, 1], 5))
    loader = make_loader(everything, CONFIG, training=False, batch_size=4, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    # The frames of the traceback hold the worker processes; left to the garbage collector they end late.
    traceback.clear_frames(caught.value.__traceback__)
    place = "train/b/2.png (" if kind == "folder" else f"b/2.png in {tmp_path / 'train.tar'} ("
    assert place in message
    assert "\n" not in message
    assert "Traceback" not in message


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["folder", "torch/image_folder"])
def test_an_image_is_never_handed_to_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_folder(tmp_path / "train", class_files() | {"b/2.png": EPS})
    data = open_data(name, root=tmp_path, validation_share=0.2, test_share=0.2)
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript was started"))
    everything = Images(data.train.read, data.train.where, np.arange(10), np.repeat([0, 1], 5))
    with pytest.raises(DataError, match="cannot identify image file"):
        list(everything)


def test_a_tar_read_before_and_in_workers_gives_the_same_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", class_files(n=20))
    data = open_data("folder", root=tmp_path, validation_share=0.2, test_share=0.2)
    here = torch.cat([x for x, _ in make_loader(data.train, CONFIG, training=False, batch_size=4)])
    loader = make_loader(data.train, CONFIG, training=False, batch_size=4, workers=2)
    assert torch.equal(here, torch.cat([x for x, _ in loader]))


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_normalised(channels: int) -> None:
    config = InputConfig((channels, 8, 8), (0.5,) * channels, (0.25,) * channels, "bilinear", 1.0)
    part = digits().test
    images, labels = next(iter(make_loader(part, config, training=False, batch_size=50)))
    assert images.shape == (50, channels, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    raw = np.stack([np.asarray(part[i][0], dtype=np.float32) for i in range(50)]) / 255
    assert torch.allclose(images[:, 0], torch.from_numpy((raw - 0.5) / 0.25), atol=1e-6)
    assert labels.tolist() == part.labels[:50].tolist()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "I;16", "CMYK"])
def test_every_image_mode_becomes_grey_or_colour(mode: str) -> None:
    grey = np.full((8, 8), 200, dtype=np.uint8)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 256)
    image = sixteen if mode == "I;16" else Image.fromarray(grey).convert(mode)
    images = Images(lambda i: image, str, np.arange(1), np.zeros(1, dtype=np.int64))
    for channels in (1, 3):
        config = InputConfig((channels, 8, 8), (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)
        batch, _ = next(iter(make_loader(images, config, training=False, batch_size=1)))
        expected = 1.0 if mode == "1" else 200 / 255
        assert batch.shape == (1, channels, 8, 8)
        assert mode == "1" or torch.allclose(batch, torch.tensor(expected), atol=0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_repeat_with_the_seed(workers: int) -> None:
    augment = Augment(scale=(0.5, 1.0), color_jitter=0.2, auto_augment="rand-m5-n1", random_erase=0.3)
    loader = make_loader(
        digits(limits=(50, None, None)).train,
        CONFIG,
        training=True,
        batch_size=16,
        workers=workers,
        augment=augment,
    )

    def epoch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        batches = list(loader)
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    (images, labels), (again, labels_again), (other, _) = epoch(1), epoch(1), epoch(2)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(images, other)
    # 50 images make three full batches; the last two images are left out.
    assert len(images) == 48


def test_a_small_training_set_is_one_batch_and_shuffled() -> None:
    part = digits(limits=(10, None, None)).train
    loader = make_loader(part, CONFIG, training=True, batch_size=16)
    orders = [tuple(labels.tolist()) for _ in range(4) for _, labels in loader]
    assert [len(order) for order in orders] == [10] * 4
    assert len(set(orders)) > 1
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(part.labels.tolist()))}


def test_loader_mistakes() -> None:
    part = digits().train
    with pytest.raises(DataError, match="1 or 3 channels"):
        make_loader(
            part, InputConfig((4, 8, 8), (0,) * 4, (1,) * 4, "bilinear", 1.0), training=False, batch_size=2
        )
    with pytest.raises(DataError, match="augmentations"):
        make_loader(part, CONFIG, training=True, batch_size=2, augment=Augment(auto_augment="nonsense"))
    empty = part.subset(np.arange(0))
    with pytest.raises(DataError, match="empty"):
        make_loader(empty, CONFIG, training=True, batch_size=2)
