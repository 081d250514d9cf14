"""Run a model without changing it: eval mode, true float32, example and random inputs, outputs as flat tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (nn.Module.train, nn.Module.eval)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` into eval mode; afterwards every submodule gets its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    # Some timm models compute tensors in eval mode, keep them, and drop them in `train`; so these are called, even if
    # the model is in eval mode already: its weights may have changed. For all others a flag is enough, and much faster.
    own = [(m, training) for m, training in flags if _functions(m.train, m.eval) != _PLAIN]
    try:
        # In steps: the `train` of some timm modules returns nothing.
        for module, _ in own:
            module.train()
            module.eval()
        for module, _ in flags:
            if module.training:
                module.training = False
        yield model
    finally:
        for module, training in own:
            module.train(training)
        for module, training in flags:
            if module.training != training:
                module.training = training


def _functions(*methods: Any) -> tuple[Any, ...]:
    """What the methods run: one may be set on the module itself."""
    return tuple(getattr(method, "__func__", None) for method in methods)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """As `eval_mode`, without gradients, and without the fused kernel for torch's transformer layers.

    That kernel calls no layer, so hooks would not see any; and inputs packed for it suit no other forward.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eval_mode(model), torch.no_grad():
            yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def comparing(model: nn.Module) -> Iterator[nn.Module]:
    """As `evaluating`, in true float32, to compare outputs to many digits.

    That is without autocast, and without TF32, the default of NVIDIA GPUs, which rounds inputs to 10 bits.
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


def as_inputs(example_input: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The arguments that a model is called with: a tensor alone, or a tuple for a model with several inputs."""
    return (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)


def flat_tensors(outputs: Any) -> list[Tensor]:
    """The tensors in a model's output, in order, out of any nesting of tuples, lists and dicts."""
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
    """Standard normal inputs of these shapes, on the device and in the dtype of the model `like`.

    `batch` replaces the first dimension. The caller's random state does not move.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(like.parameters(), torch.zeros(()))
    sized = [(batch or shape[0], *shape[1:]) for shape in shapes]
    return tuple(
        torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype) for shape in sized
    )
