"""How long each layer takes in ONNX Runtime, measured alone: what channels cost where multiply-accumulates mislead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.export import export_onnx
from sparsekit.groups import ChannelGroups
from sparsekit.latency import compare_latency
from sparsekit.modes import evaluating

__all__ = ["measure_layers"]


def measure_layers(
    model: nn.Module, groups: ChannelGroups, *example_inputs: Tensor, threads: int = 1, rounds: int = 30
) -> ChannelGroups:
    """Give every layer of `groups` the milliseconds that ONNX Runtime takes for it, at the example's shapes and batch.

    Each layer is exported alone and timed, all of them interleaved; layers of one kind and shape once. A layer's time
    includes bringing its input into the runtime's layout, so the sum is more than the model's: the shares count.
    With it `target={"latency": 0.5}` and `channel_latencies` can be had. `layers` keep an order, names and shapes.

    Raises InputError if `groups` are of another model.
    """
    modules = dict(model.named_modules())
    names = {layer.weight: layer.weight.rpartition(".")[0] for layer in groups.layers}
    missing = [name for name in names.values() if name not in modules]
    if missing:
        raise InputError(f"the model has no layer {missing[0]}, which its channel groups name")
    inputs = _observed_inputs(model, {name: modules[name] for name in names.values()}, example_inputs)
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, shape in inputs.items():
        kinds.setdefault((_kind(modules[name]), shape), name)
    with TemporaryDirectory() as folder:
        files = [
            export_onnx(modules[name], Path(folder) / f"{number}.onnx", torch.zeros(shape))
            for number, ((_, shape), name) in enumerate(kinds.items())
        ]
        timed = compare_latency(files, threads=threads, rounds=rounds)
    ms = {kind: latency.median_ms for kind, latency in zip(kinds, timed.latencies, strict=True)}
    return replace(
        groups,
        layers=tuple(
            replace(layer, ms=ms[_kind(modules[name]), inputs[name]] if name in inputs else 0.0)
            for layer, name in zip(groups.layers, names.values(), strict=True)
        ),
    )


def _kind(module: nn.Module) -> str:
    """What the time of a layer depends on beside its input: its class and its settings."""
    return f"{type(module).__qualname__} {module.extra_repr()}"


def _observed_inputs(
    model: nn.Module, layers: dict[str, nn.Module], example_inputs: tuple[Tensor, ...]
) -> dict[str, tuple[int, ...]]:
    """Shape of what each layer is given in a forward pass (the last, if it is called several times)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        shapes[name] = tuple(args[0].shape)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: note(name, args))
        for name, module in layers.items()
    ]
    try:
        with evaluating(model):
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
