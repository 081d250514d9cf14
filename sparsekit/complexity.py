"""MACs and parameters: of a model as it is, and of what a set of keep-masks would leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.errors import InputError
from sparsekit.groups import ChannelGroups, LayerCost
from sparsekit.modes import evaluating

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def count_params(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, *example_inputs: Tensor) -> int:
    """Multiply-accumulates of one forward pass on the example, divided by its batch size (FLOPs / 2).

    Counts convolutions and every kind of matrix product, attention included, as `torch.utils.flop_counter` does.
    Runs in eval mode without gradients; the model keeps its training flags and what requires gradients.
    """
    # The counter follows modules by the gradients of what they are given, and stumbles over a parameter among that.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = [example.detach() for example in example_inputs]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(model), attention_in_the_open(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops() // 2 // example_inputs[0].shape[0])


@contextmanager
def attention_in_the_open() -> Iterator[None]:
    """Compute attention as plain matrix products: the counter does not know what the fused kernels of a CPU do."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def layer_costs(model: nn.Module, *example_inputs: Tensor) -> tuple[LayerCost, ...]:
    """Cost of every convolution and linear layer, observed in one forward pass at the example's shapes."""
    positions: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.Linear):
            count = out.numel() // weight.shape[0]
        else:
            mapped = args[0] if isinstance(module, _TRANSPOSED) else out
            count = prod(mapped.shape[2:]) * mapped.shape[0]
        key = f"{name}.weight" if name else "weight"
        positions[key] = positions.get(key, 0) + count // example_inputs[0].shape[0]
        shapes[key] = tuple(weight.shape)

    watch_layers(model, record, *example_inputs)
    return tuple(LayerCost(name, shapes[name], positions[name]) for name in positions)


def watch_layers(
    model: nn.Module,
    record: Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], None],
    *example_inputs: Tensor,
) -> None:
    """Run the model once in eval mode; `record(name, layer, inputs, output)` for each call of a layer with MACs."""
    hooks = [
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: record(name, m, (*args, *kwargs.values()), out),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear))
    ]
    try:
        with evaluating(model):
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()


def channel_macs(groups: ChannelGroups) -> dict[str, float]:
    """MACs that one channel of each free group costs in the layers that make, filter and read it, by group name.

    At the widths the model has now; a layer between two groups counts in both.
    """
    return _channel_costs(groups, {layer.weight: float(layer.macs) for layer in groups.layers})


def channel_latencies(groups: ChannelGroups) -> dict[str, float]:
    """Milliseconds that one channel of each free group costs, like `channel_macs`.

    Raises InputError for groups that `measure_layers` has not measured.
    """
    return _channel_costs(groups, {layer.weight: _measured(layer) for layer in groups.layers})


def _channel_costs(groups: ChannelGroups, of_layer: Mapping[str, float]) -> dict[str, float]:
    shapes = {layer.weight: layer.shape for layer in groups.layers}
    return {
        group.name: sum(
            of_layer[m.tensor] * m.repeat / shapes[m.tensor][m.dim]
            for m in group.members
            if m.role != "size" and m.tensor in of_layer
        )
        for group in groups.free
    }


def _measured(layer: LayerCost) -> float:
    if layer.ms is None:
        raise InputError(
            "the layers' latencies have not been measured; take the groups that sparsekit.measure_layers returns"
        )
    return layer.ms


@dataclass(frozen=True)
class CostShare:
    """What masks would leave, as fractions in (0, 1] of the dense model's layer MACs, parameters and channels.

    `latency`: of the time that the dense model takes, by the curves of its layers; NaN where it was not measured.
    """

    macs: float
    params: float
    channels: float
    latency: float = math.nan


def kept_share(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> CostShare:
    """Share of MACs, parameters and free channels that the keep-masks (True = keep) would leave.

    MACs are those of convolutions and linear layers: products between activations (attention scores) depend on
    no weight and are left out.
    """
    kept_counts = {name: int(mask.sum()) for name, mask in masks.items()}
    removed: dict[tuple[str, int], int] = {}
    gone_channels = 0
    bypassed = [group.bypass for group in groups.free if group.bypass and kept_counts.get(group.name) == 0]
    for group in groups.free:
        gone = group.n_channels - kept_counts.get(group.name, group.n_channels)
        if any(group.lies_in(block) for block in bypassed):
            gone = group.n_channels
        gone_channels += gone
        for member in group.members if gone else ():
            key = (member.tensor, member.dim)
            removed[key] = removed.get(key, 0) + gone * member.repeat

    def sizes_left(tensor: str, shape: tuple[int, ...]) -> list[int]:
        # A block that goes as a whole may have lost channels as well.
        return [max(size - removed.get((tensor, dim), 0), 0) for dim, size in enumerate(shape)]

    def left(tensor: str, shape: tuple[int, ...]) -> int:
        return prod(sizes_left(tensor, shape))

    dense_macs = sum(layer.macs for layer in groups.layers)
    dense_ms = sum(math.nan if layer.ms is None else layer.ms for layer in groups.layers)
    ms = sum(
        math.nan if layer.curve is None else float(layer.curve.at(*sizes_left(layer.weight, layer.shape)[:2]))
        for layer in groups.layers
    )
    macs = sum(left(layer.weight, layer.shape) * layer.positions for layer in groups.layers)
    dense_params = sum(prod(groups.tensor_shapes[name]) for name in groups.parameters)
    params = sum(left(name, groups.tensor_shapes[name]) for name in groups.parameters)
    channels = sum(group.n_channels for group in groups.free)
    return CostShare(
        macs=macs / dense_macs if dense_macs else 1.0,
        params=params / dense_params if dense_params else 1.0,
        channels=1 - gone_channels / channels if channels else 1.0,
        latency=ms / dense_ms if dense_ms else math.nan,
    )
