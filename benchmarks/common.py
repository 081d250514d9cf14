"""What the benchmarks do alike: write results, save a drawing, name the machine, read digits, flatten outputs.

Torch comes with the first use of a function that needs it: the parent of `zoo.py` makes none.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparsekit as sk

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

Labelled = tuple["Tensor", "Tensor"]
HIGHEST_SHARE = 0.75


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path beside `file` that takes its place once it is written: an interruption leaves the file as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """The file whole, or as it was."""
    with whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """As `write_text`; NaN and infinity, which are not JSON, raise ValueError."""
    write_text(file, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_figure(figure: Figure, file: Path) -> None:
    """As SVG, without a date: the same figures give the same file."""
    figure.tight_layout()
    with whole(file) as unfinished:
        figure.savefig(unfinished, format="svg", metadata={"Date": None})


# ---- circumstances ---------------------------------------------------------------------------------------------------


def machine_text() -> str:
    """The processor and how many cores of it we may use."""
    machine = sk.describe_machine()
    return f"{machine['cpu']}, {machine['logical_cores']} cores"


def versions_text(*libraries: str) -> str:
    """Name and version of each of them that is installed."""
    versions = sk.library_versions()
    return ", ".join(f"{name} {versions[name]}" for name in libraries if name in versions)


# ---- data ------------------------------------------------------------------------------------------------------------


def digits(side: int = 8) -> tuple[Labelled, Labelled]:
    """scikit-learn's handwritten digits in a fixed random order: 1,400 for training and 397 for test, with labels.

    Images are (n, 1, side, side) in [-1, 1].
    """
    import torch
    from sklearn.datasets import load_digits
    from torch.nn import functional as F

    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1)[order]
    if side != images.shape[-1]:
        images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    labels = torch.tensor(raw.target)[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


# ---- models ----------------------------------------------------------------------------------------------------------


def wake_constants_(model: nn.Module, generator: torch.Generator) -> None:
    """Give parameters that are constant (norms, layer scales, zeros) random values, in place.

    Behind a branch that starts at zero any cut would look right.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.flatten()
            if flat.numel() and bool((flat == flat[0]).all()):
                noise = torch.rand(parameter.shape, generator=generator)
                table = parameter.dim() > 1 and float(flat[0]) == 0
                parameter.copy_(0.2 * (noise - 0.5) if table or name.endswith("bias") else 0.5 + noise)


def random_mask(group: sk.ChannelGroup, draw: random.Random) -> Tensor:
    """Which units stay where a group loses a random share of them: from none to three quarters."""
    import torch

    n = group.n_channels
    gone = min(round(n * draw.uniform(0, HIGHEST_SHARE)), n - group.least)
    mask = torch.ones(n, dtype=torch.bool)
    mask[draw.sample(range(n), max(gone, 0))] = False
    return mask


def flat_tensors(outputs: Any) -> list[Tensor]:
    """The tensors in a model's output, in order, out of any nesting of tuples, lists and dicts."""
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for output in outputs for tensor in flat_tensors(output)]
    return [outputs] if hasattr(outputs, "requires_grad") else []
