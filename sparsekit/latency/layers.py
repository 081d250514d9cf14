"""The latency of every layer in ONNX Runtime as a function of its channels. MACs would mislead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.evaluation import ExampleInput
from sparsekit.export.group_merging import merge_factor
from sparsekit.export.onnx_file import export_onnx
from sparsekit.latency.compare import compare_latency
from sparsekit.latency.operators import Operator
from sparsekit.latency.table import LatencyTable
from sparsekit.machine import conv_step
from sparsekit.structure.counting import watch_layers
from sparsekit.structure.groups import ChannelGroups, LayerCost
from sparsekit.structure.latency_curve import LatencyCurve

__all__ = ["measure_layers"]

# A layer is timed at these shares of its width, rounded to whole steps. In between, time is nearly a straight line.
_SHARES = (0.125, 0.375, 0.625, 1.0)
_ROUNDS = 30


def measure_layers(
    model: nn.Module,
    groups: ChannelGroups,
    example_input: ExampleInput,
    *,
    threads: int = 1,
    table: LatencyTable | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChannelGroups:
    """Measure every layer's latency in ONNX Runtime as a function of its channels; returns groups with the curves.

    Inputs have the shapes of `example_input`. The kernel of each convolution and linear layer is timed at four shares
    of each dimension that can shrink, rounded to whole steps; the size of a step is measured too. What `table` knows is
    not measured again. The exported model is timed as well, and the time that its layers do not explain is spread over
    them by the size of their outputs. A layer that runs twice counts twice. Transposed convolutions and the
    first projections of torch's attention are not timed; their latency is estimated from their MACs.

    The result is what `target={"latency": 0.5}`, a `latency` limit of `choose_channels` and `channel_latencies` need.
    `LayerCost.ms` is the latency in the dense model. Raises InputError if `groups` are of another model, or `table` is
    of another number of threads.
    """
    names = {layer.weight: layer.weight.rpartition(".")[0] for layer in groups.layers}
    modules = dict(model.named_modules())
    missing = [name for name in names.values() if name not in modules]
    if missing:
        raise InputError(f"the model has no layer {missing[0]}, which its channel groups name")
    table = LatencyTable(threads=threads) if table is None else table
    if table.threads != threads:
        raise InputError(f"the latency table is of {table.threads} threads, and {threads} were asked for")
    runs = _layer_runs(model, example_input)
    steps = {"conv": table.conv_step(), "product": table.product_step()}
    sweeps = [_Sweep.of(layer, groups, runs[names[layer.weight]], steps) for layer in groups.layers]
    table.ms([operator for sweep in sweeps for operator in sweep.operators], progress=progress)
    own = [sweep.curve(table) for sweep in sweeps]
    layers = _shared_out(groups.layers, own, runs, _whole_ms(model, threads, example_input))
    measured = replace(groups, layers=layers)
    return measured.with_rounding("auto", groups.min_channels) if groups.round_to == "auto" else measured


@dataclass(frozen=True)
class _LayerRun:
    """One run of a layer in the model, with the shapes of its input and output."""

    layer: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def _layer_runs(model: nn.Module, example_input: ExampleInput) -> dict[str, list[_LayerRun]]:
    runs: dict[str, list[_LayerRun]] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs.setdefault(name, []).append(_LayerRun(layer, tuple(inputs[0].shape), tuple(output.shape)))

    watch_layers(model, example_input, record)
    return runs


@dataclass(frozen=True)
class _Sweep:
    """The sizes at which one layer is timed. `at` has for each pair of sizes one operator for each run of the layer."""

    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    steps: tuple[int, int]
    at: tuple[tuple[Operator, ...], ...]

    @staticmethod
    def of(
        layer: LayerCost, groups: ChannelGroups, runs: Sequence[_LayerRun], steps: dict[str, int]
    ) -> _Sweep:
        module = runs[0].layer
        if isinstance(module, (nn.modules.conv._ConvTransposeNd, nn.MultiheadAttention)):
            return _Sweep(((layer.shape[0],), (layer.shape[1],)), (1, 1), ())
        widths = [group for group in groups.free if not group.bypass]
        shrinking = {m.dim for g in widths for m in g.members if m.tensor == layer.weight}
        step, in_places = steps["product" if isinstance(module, nn.Linear) else "conv"], False
        multiples = own_steps = (step, step)
        conv_groups, merged = getattr(module, "groups", 1), 1
        if conv_groups > 1 and layer.shape[0] != conv_groups:
            # Whole conv_groups go or, where the inputs shrink too, the same places of each of them.
            in_places, width = 1 in shrinking, layer.shape[0] // conv_groups
            merged = (
                1 if in_places or not _mergeable(runs) else merge_factor(layer.shape[1], width, conv_step())
            )
            multiples = (conv_groups if in_places else width * merged, 1)
            own_steps = (width * merged if merged > 1 else 1, 1)
        first, second = (
            _sizes(layer.shape[dim], multiple) if dim in shrinking else (layer.shape[dim],)
            for dim, multiple in enumerate(multiples)
        )
        if merged > 1 and len(first) > 1:
            # The full number of conv_groups may not be mergeable, and then takes longer than one less.
            first = tuple(sorted({*first, layer.shape[0] // multiples[0] * multiples[0]}))
        operators = tuple(
            tuple(_operator(run, out, into, in_places, _mergeable(runs)) for run in runs)
            for out, into in product(first, second)
        )
        return _Sweep((first, second), own_steps, operators)

    @property
    def operators(self) -> list[Operator]:
        return [operator for at_sizes in self.at for operator in at_sizes]

    def curve(self, table: LatencyTable) -> LatencyCurve | None:
        """Return the curve; None for a layer that is not timed."""
        if not self.at:
            return None
        times = iter([sum(table.ms(at_sizes)) for at_sizes in self.at])
        rows = tuple(tuple(next(times) for _ in self.sizes[1]) for _ in self.sizes[0])
        return LatencyCurve(self.sizes, rows, self.steps)


def _sizes(n: int, step: int) -> tuple[int, ...]:
    """Return the multiples of `step` next to some shares of n, and n itself."""
    near = {min(max(round(share * n / step), 1) * step, n) for share in _SHARES}
    return tuple(sorted(near | {n}))


def _mergeable(runs: Sequence[_LayerRun]) -> bool:
    """Whether the export merges the conv_groups of this layer: it is 2-d and its weight is read once."""
    return len(runs) == 1 and isinstance(runs[0].layer, nn.Conv2d)


def _operator(run: _LayerRun, out: int, into: int, in_places: bool, mergeable: bool) -> Operator:
    """Return the operator of a run with `out` and `into` as the first two sizes of the weight.

    A grouped convolution loses places in each of its conv_groups (`in_places`), or whole conv_groups.
    """
    module, shape = run.layer, run.input_shape
    if isinstance(module, nn.Linear):
        return Operator((prod(shape[:-1]), into), (into, out))
    assert isinstance(module, nn.modules.conv._ConvNd)
    kernel, strides, dilations = (
        tuple(int(n) for n in getattr(module, name)) for name in ("kernel_size", "stride", "dilation")
    )
    conv_groups = module.groups
    if conv_groups > 1 and not in_places:
        conv_groups = max(conv_groups * out // module.out_channels, 1)
    # The pads follow from the sizes, whether the module pads or code around it.
    missing = [
        max((after - 1) * s + (k - 1) * d + 1 - before, 0)
        for before, after, k, s, d in zip(
            shape[2:], run.output_shape[2:], kernel, strides, dilations, strict=True
        )
    ]
    pads = (*(n // 2 for n in missing), *(n - n // 2 for n in missing))
    factor = merge_factor(into, out // conv_groups, conv_step()) if mergeable else 1
    if conv_groups % factor:
        factor = 1
    return Operator(
        (shape[0], into * conv_groups, *shape[2:]),
        (out, into * factor, *kernel),
        strides,
        pads,
        dilations,
        conv_groups // factor,
    )


def _whole_ms(model: nn.Module, threads: int, example_input: ExampleInput) -> float:
    with TemporaryDirectory() as folder:
        file = export_onnx(model, Path(folder) / "model.onnx", example_input, output_names=())
        return compare_latency([file], threads=threads, rounds=_ROUNDS).latencies[0].median_ms


def _shared_out(
    layers: Sequence[LayerCost],
    curves: Sequence[LatencyCurve | None],
    runs: dict[str, list[_LayerRun]],
    whole_ms: float,
) -> tuple[LayerCost, ...]:
    """Return the layers with curves that add up to the time of the whole model."""
    timed_macs = sum(layer.macs for layer, curve in zip(layers, curves, strict=True) if curve is not None)
    timed_ms = sum(curve.dense_ms for curve in curves if curve is not None)
    per_mac = timed_ms / timed_macs if timed_macs else whole_ms / max(sum(layer.macs for layer in layers), 1)
    estimated = [
        curve or LatencyCurve(((layer.shape[0],), (layer.shape[1],)), ((per_mac * layer.macs,),), outputs=1)
        for layer, curve in zip(layers, curves, strict=True)
    ]
    explained = sum(curve.dense_ms for curve in estimated)
    # Kernels may be faster in the model than alone. Then nothing is left for other operators.
    factor = min(whole_ms / explained, 1.0) if explained else 1.0
    elements = [
        sum(prod(run.output_shape) for run in runs[layer.weight.rpartition(".")[0]]) for layer in layers
    ]
    beside = max(whole_ms - explained, 0.0) / max(sum(elements), 1)
    return tuple(
        replace(
            layer,
            curve=replace(
                curve,
                ms=tuple(tuple(factor * ms for ms in row) for row in curve.ms),
                beside_ms=beside * n,
            ),
        )
        for layer, curve, n in zip(layers, estimated, elements, strict=True)
    )
