"""How long each layer takes in ONNX Runtime, measured alone: what channels cost where multiply-accumulates mislead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from sparsekit.complexity import watch_layers
from sparsekit.errors import InputError
from sparsekit.export import export_onnx
from sparsekit.groups import ChannelGroups
from sparsekit.latency import compare_latency

__all__ = ["measure_layers"]

_Kind = tuple[str, tuple[int, ...]]


def measure_layers(
    model: nn.Module, groups: ChannelGroups, *example_inputs: Tensor, threads: int = 1, rounds: int = 30
) -> ChannelGroups:
    """Give every layer of `groups` the milliseconds that ONNX Runtime takes for it, at the example's shapes and batch.

    Each layer is exported alone and timed, all of them interleaved; layers of one kind and shape once. A layer that
    runs twice counts twice. A layer's time
    includes bringing its input into the runtime's layout, so the sum is more than the model's: the shares count.
    With it `target={"latency": 0.5}` and `channel_latencies` can be had. `layers` keep an order, names and shapes.

    Raises InputError if `groups` are of another model.
    """
    modules = dict(model.named_modules())
    names = {layer.weight: layer.weight.rpartition(".")[0] for layer in groups.layers}
    missing = [name for name in names.values() if name not in modules]
    if missing:
        raise InputError(f"the model has no layer {missing[0]}, which its channel groups name")
    calls: dict[str, list[_Kind]] = {name: [] for name in names.values()}
    layers: dict[_Kind, nn.Module] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        kind = _kind(layer, inputs[0])
        layers.setdefault(kind, layer)
        calls.setdefault(name, []).append(kind)

    watch_layers(model, record, *example_inputs)
    with TemporaryDirectory() as folder:
        files = [
            export_onnx(layer, Path(folder) / f"{number}.onnx", torch.zeros(kind[1]))
            for number, (kind, layer) in enumerate(layers.items())
        ]
        timed = compare_latency(files, threads=threads, rounds=rounds)
    ms = {kind: latency.median_ms for kind, latency in zip(layers, timed.latencies, strict=True)}
    return replace(
        groups,
        layers=tuple(
            replace(layer, ms=sum(ms[kind] for kind in calls[names[layer.weight]])) for layer in groups.layers
        ),
    )


def _kind(layer: nn.Module, example: Tensor) -> _Kind:
    """What the time of a layer depends on: its class and settings, and the shape of its input."""
    return f"{type(layer).__qualname__} {layer.extra_repr()}", tuple(example.shape)
