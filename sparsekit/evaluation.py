"""Borrowing a model: eval mode inside, its own training flags and the random state back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` into eval mode; every submodule gets its own training flag back after."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        # Some timm models keep what they computed for evaluation until train() is called.
        yield model.train().eval()
    finally:
        model.train(flags[0][1])
        for module, training in flags:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """`eval_mode`, and no gradients."""
    with eval_mode(model), torch.no_grad():
        yield model


@contextmanager
def comparing(model: nn.Module) -> Iterator[nn.Module]:
    """`evaluating`, in true float32 for what is compared to many digits.

    Without autocast, and on an NVIDIA GPU without TF32, in which convolutions are computed there unless one objects: it
    rounds their inputs to 10 bits.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.autocast(device.type, enabled=False), _no_tf32():
        yield model


@contextmanager
def _no_tf32() -> Iterator[None]:
    convolutions: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    switches: list[tuple[Any, str, Any]] = [
        (convolutions, "allow_tf32", False),
        (products, "allow_tf32", False),
    ]
    try:
        before = [getattr(place, name) for place, name, _ in switches]
    except RuntimeError:  # torch 2.9 has switches for each kind of operation, and objects where they differ
        kinds = (convolutions.conv, convolutions.rnn, products)
        switches = [(kind, "fp32_precision", "ieee") for kind in kinds]
        before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, value in switches:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def flat_tensors(outputs: Any) -> list[Tensor]:
    """The tensors in a model's output, in order, whatever nesting of tuples, lists and dicts it returns."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for output in outputs for tensor in flat_tensors(output)]
    return []


def random_inputs(
    shapes: tuple[tuple[int, ...], ...], seed: int, like: nn.Module, batch: int | None = None
) -> tuple[Tensor, ...]:
    """Standard normal inputs of these shapes (first dimension replaced by `batch`) on the model's device and dtype.

    Drawn from a generator of their own: the caller's random state does not move.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(like.parameters(), torch.zeros(()))
    sized = [(batch or shape[0], *shape[1:]) for shape in shapes]
    return tuple(
        torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype) for shape in sized
    )
