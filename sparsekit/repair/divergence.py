"""How far the outputs of two models are apart on the same images, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekit.evaluation import flat_tensors
from sparsekit.options import Outputs

# Of the entropy of classes that are all alike.
_ALIKE = 0.9


@dataclass(frozen=True)
class Divergence:
    """How far a model's outputs are from the dense model's, over some images.

    - `kl` is the mean Kullback-Leibler divergence KL(dense || model) of the predicted classes, in nats.
    - `agreement` is the share of images, in [0, 1], whose most likely class is the same.

    An output of two dimensions counts as (images, classes), unless it was said to be values. Any other counts as a
    Gaussian with the dense output's variance: its kl is half the mean squared difference over that variance, and it has
    no part in `agreement` (NaN if there is no other). Several outputs are added up. Outputs that are no numbers are
    infinitely far away.
    """

    kl: float
    agreement: float


def is_logits(output: Tensor) -> bool:
    """Whether an output is a table of (images, classes)."""
    return output.dim() == 2 and output.shape[1] > 1 and output.is_floating_point()


def compared(outputs: Any, kind: Outputs = "classes") -> list[Tensor]:
    """Return the tensors in a model's output that are compared: floating-point numbers, some for each image.

    Of `kind` "values" those of two dimensions get a third, so that they are not taken for scores of classes.
    """
    found = [t for t in flat_tensors(outputs) if t.is_floating_point() and t.dim() and t.numel()]
    return found if kind == "classes" else [t[..., None] if t.dim() == 2 else t for t in found]


def look_like_values(outputs: Sequence[Tensor]) -> bool:
    """Whether what counts as scores of classes leaves them nearly alike on average: no trained classifier does that."""
    for output in outputs:
        if is_logits(output):
            scores = output.double().log_softmax(1)
            entropy = -(scores.exp() * scores).sum(1).mean()
            return float(entropy) > _ALIKE * math.log(output.shape[1])
    return False


def confidence(outputs: Sequence[Tensor]) -> float:
    """The largest probability that the first scores of classes name, on average; NaN without such scores."""
    for output in outputs:
        if is_logits(output):
            return float(output.double().softmax(1).amax(1).mean())
    return float("nan")


def divergence(dense: Sequence[Tensor], outputs: Sequence[Tensor]) -> Divergence:
    """Compare all outputs of two models on the same images; see `Divergence`."""
    total, agreements = 0.0, []
    for target, output in zip(dense, outputs, strict=True):
        if target.is_floating_point() and target.numel():
            # In float64, where a rounding error does not make it negative.
            found = float(kl(target.double(), output.double()))
            total += max(found, 0.0) if math.isfinite(found) else math.inf
        if is_logits(target):
            agreements.append(float((target.argmax(1) == output.argmax(1)).double().mean()))
    return Divergence(total, sum(agreements) / len(agreements) if agreements else float("nan"))


def kl(dense: Tensor, output: Tensor, *, variance: Tensor | None = None) -> Tensor:
    """Return KL(dense || output) of one output, averaged over the images; a gradient can be taken.

    `variance` is that of the dense output over more images than these, for outputs that are no logits.
    """
    dtype = torch.float64 if dense.dtype == torch.float64 else torch.float32
    dense, output = dense.to(dtype), output.to(dtype)
    if is_logits(dense):
        return F.kl_div(output.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True)
    variance = (dense.var() if variance is None else variance.to(dtype)).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return (output - dense).square().mean() / (2 * variance)


def sampled_loss(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Return a loss whose gradient's square has, on average, the curvature of the divergence (Fisher).

    `outputs` are those that `compared` returns. The label of each image is drawn from the model's own prediction:
    confident images have almost no gradient at their most likely class. Source: Kunstner et al., "Limitations of the
    empirical Fisher approximation", 2019.
    """
    total = torch.zeros(())
    for output in outputs:
        if not output.requires_grad:
            continue
        if is_logits(output):
            probabilities = output.detach().float().softmax(1).cpu()
            labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(output.device)
            total = total.to(output.device) + F.cross_entropy(output.float(), labels, reduction="sum")
        else:
            spread = output.detach().float().std(correction=0).clamp_min(1e-12)
            per_image = output[0].numel()
            noise = torch.randn(output.shape, generator=generator).to(output.device)
            total = total.to(output.device) + (output.float() * noise).sum() / (spread * per_image**0.5)
    return total
