"""Images are taken as people have them; what cannot be used is refused, with what is wrong, where, and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sparsekit.errors import DataError
from sparsekit.finished.images import collect_images

IMAGES = torch.randn(40, 3, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40)


def batches(make: Callable[[Tensor, Tensor], Any], size: int = 8) -> list[Any]:
    return [make(x, y) for x, y in zip(IMAGES.split(size), LABELS.split(size), strict=True)]


FORMS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: IMAGES,
    "with gradient": lambda: IMAGES.clone().requires_grad_(),
    "batches": lambda: batches(lambda x, y: x),
    "uneven batches": lambda: IMAGES.split([1, 30, 9]),
    "generator": lambda: (x for x in IMAGES.split(8)),
    "pairs": lambda: batches(lambda x, y: (x, y)),
    "lists": lambda: batches(lambda x, y: [x, y]),
    "nested": lambda: batches(lambda x, y: ((x, y), y)),
    "pixel_values": lambda: batches(lambda x, y: {"labels": y, "pixel_values": x}),
    "image": lambda: batches(lambda x, y: {"image": x, "label": y}),
    "images": lambda: batches(lambda x, y: {"images": x}),
    "input": lambda: batches(lambda x, y: {"input": x}),
    "loader": lambda: DataLoader(TensorDataset(IMAGES), batch_size=7),
    "loader with labels": lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=7),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_images_in_order(form: str) -> None:
    found = collect_images(FORMS[form](), most=512)
    assert torch.equal(found, IMAGES)
    assert found.device.type == "cpu"
    assert not found.requires_grad
    assert torch.equal(collect_images(FORMS[form](), most=35), IMAGES[:35])


def test_no_more_is_read_than_is_used() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield IMAGES[:16]

    assert len(collect_images(endless(), most=50)) == 50


def exhausted() -> Iterator[Tensor]:
    used = iter(IMAGES.split(8))
    list(used)
    return used


def spoiled(value: float) -> Tensor:
    images = IMAGES.clone()
    images[17, 2, 3, 1] = value
    return images


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (list, r"no images.*gives no batch.*generator can be read only once"),
    "exhausted": (exhausted, r"no images.*gives no batch.*generator can be read only once"),
    "few": (lambda: IMAGES[:31], r"31 images are too few.*at least 32.*labels are not needed"),
    "few in batches": (lambda: IMAGES[:31].split(8), r"31 images are too few.*at least 32"),
    "not a number": (lambda: spoiled(float("nan")), r"image 17 has values that are not finite"),
    "infinite": (lambda: spoiled(float("inf")), r"image 17 has values that are not finite"),
    "constant": (lambda: torch.zeros(40, 3, 6, 5), r"all images are the same.*nothing can be learned"),
    "the same": (lambda: IMAGES[:1].expand(40, 3, 6, 5), r"all images are the same"),
    "bytes": (
        lambda: (IMAGES * 50).to(torch.uint8),
        r"floating-point numbers, normalised as the model expects.*got torch.uint8",
    ),
    "integers": (lambda: [(IMAGES * 50).long()], r"floating-point numbers.*got torch.int64"),
    "mixed sizes": (
        lambda: [IMAGES[:20], IMAGES[20:, :, :5]],
        r"images differ in shape: \(3, 6, 5\), and in batch 1 \(3, 5, 5\)",
    ),
    "a path": (lambda: "images/", r"must be a tensor, an iterable of batches or a DataLoader, got str"),
    "a dictionary": (lambda: {"image": IMAGES}, r"must be a tensor.*got dict"),
    "nothing": (lambda: None, r"must be a tensor.*got NoneType"),
    "a number": (lambda: 3, r"must be a tensor.*got int"),
    "strings": (lambda: ["a.jpg", "b.jpg"], r"a batch must be a tensor of images.*got str"),
    "arrays": (lambda: IMAGES.numpy(), r"a batch must be a tensor of images.*got ndarray"),
    "unknown keys": (lambda: [{"x": IMAGES}], r"a batch must be a tensor of images.*got NoneType"),
    "empty tuples": (lambda: [()], r"a batch must be a tensor of images.*got tuple"),
    "vectors of numbers": (lambda: [torch.randn(40)], r"a batch must be.*a tensor of shape \(40,\)"),
    "a vector of numbers": (lambda: torch.randn(40), r"images must be .*a tensor of shape \(40,\)"),
    "a single number": (lambda: torch.tensor(1.0), r"images must be .*a tensor of shape \(\)"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_used_is_refused(bad: str) -> None:
    make, message = BAD[bad]
    with pytest.raises(DataError, match=f"(?s){message}"):
        collect_images(make(), most=512)


def test_a_limit_below_what_is_needed_is_refused_as_such() -> None:
    for given in (IMAGES, IMAGES.split(8)):
        with pytest.raises(DataError, match=r"max_images must be at least 32, got 20"):
            collect_images(given, most=20)


def test_an_array_of_numpy_becomes_images_by_a_simple_step() -> None:
    assert torch.equal(collect_images(torch.from_numpy(np.asarray(IMAGES)), most=40), IMAGES)
