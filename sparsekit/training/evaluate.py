"""Evaluate a model: accuracy and loss over a loader, and its answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.errors import DataError
from sparsekit.evaluation import comparing, evaluating
from sparsekit.training.options import Loader


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in [0, 1], mean cross-entropy, number of images."""

    accuracy: float
    loss: float
    count: int


def evaluate(model: nn.Module, loader: Loader, accelerator: Accelerator) -> Evaluation:
    """Accuracy and loss over `loader`, exact over all processes.

    The model moves to the accelerator's device and keeps its training flags. Raises DataError for an empty loader.
    """
    return evaluate_prepared(model, prepare_loader(loader, accelerator), accelerator)


def answers(model: nn.Module, loader: Loader) -> Tensor:
    """Return the classes, int64 (n,), that a model gives to the images of a loader, in its order; on the CPU.

    Raises DataError for an empty loader.
    """
    device = next(model.parameters()).device
    with comparing(model):
        found = [model(images.to(device)).argmax(dim=1).cpu() for images, _ in loader]
    if not found:
        raise DataError("the loader to answer has no images.")
    return torch.cat(found)


def prepare_loader(loader: Loader, accelerator: Accelerator) -> Loader:
    """The loader as accelerate prepares it: batches are shared among processes and moved to the device."""
    prepared: Loader = accelerator.prepare_data_loader(loader)  # returns a prepared one as it is
    return prepared


def evaluate_prepared(model: nn.Module, loader: Loader, accelerator: Accelerator) -> Evaluation:
    """As `evaluate`, of a loader that is prepared already."""
    model.to(accelerator.device)
    columns = []
    with evaluating(model):
        for images, labels in loader:
            with accelerator.autocast():
                logits = model(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, labels, reduction="none")
            correct = (logits.argmax(dim=1) == labels).to(loss.dtype)
            columns.append(accelerator.gather_for_metrics(torch.stack([correct, loss], dim=1)))
    if not columns:
        raise DataError("the loader to evaluate on has no images.")
    table = torch.cat(columns).cpu().double()
    accuracy, loss_mean = table.mean(dim=0).tolist()
    return Evaluation(accuracy=accuracy, loss=loss_mean, count=len(table))
