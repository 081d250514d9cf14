"""Layers get the times of their operators at the widths their groups can leave; the model's time is shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from plain import find_groups
from plain import sparsifier as sparsifier_of
from torch import nn

import sparsekit as sk
from sparsekit.errors import InputError
from sparsekit.latency import layers as layer_latency
from sparsekit.latency.compare import Interval, Latency, LatencyComparison
from sparsekit.latency.operators import Operator
from sparsekit.latency.table import LatencyTable
from sparsekit.selection.costs import kept_share

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Stopwatch(LatencyTable):
    """Every operator takes what it multiplies; convolutions run in blocks of 4, products in none."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.asked: list[Operator] = []

    def ms(self, operators: Sequence[Operator], **_: object) -> list[float]:
        self.asked += operators
        return [self._one(operator) for operator in operators]

    def _one(self, operator: Operator) -> float:
        maps = torch.zeros(operator.input_shape)
        if not operator.strides:
            return float(operator.input_shape[0] * operator.weight_shape[0] * operator.weight_shape[1])
        n = len(operator.strides)
        before, behind = operator.pads[:n], operator.pads[n:]
        pads = [p for pair in zip(reversed(before), reversed(behind), strict=True) for p in pair]
        convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d}[n]
        out = convolve(
            nn.functional.pad(maps, pads),
            torch.zeros(operator.weight_shape),
            stride=operator.strides,
            dilation=operator.dilations,
            groups=operator.conv_groups,
        )
        return float(out.numel() * torch.zeros(operator.weight_shape[1:]).numel())

    def conv_step(self) -> int:
        return 4

    def product_step(self) -> int:
        return 1


@pytest.fixture(autouse=True)
def nothing_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with merged groups are the matter of test_group_merging."""
    monkeypatch.setattr(layer_latency, "conv_step", lambda: 1)


def _whole_takes(ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is written and timed for the whole model."""

    def compare(files: list[Path], **_: object) -> LatencyComparison:
        readings = tuple(Latency(str(file), ms, ms, ms, 2) for file in files)
        return LatencyComparison(readings, (), Interval(1.0, 1.0, 1.0), 1, 2, 10, True, "")

    monkeypatch.setattr(layer_latency, "compare_latency", compare)
    monkeypatch.setattr(layer_latency, "export_onnx", lambda model, path, *_, **__: path)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def test_layers_are_really_measured(tmp_path: Path) -> None:
    model = _network()
    groups = find_groups(model, EXAMPLE)
    measured = sk.measure_layers(model, groups, EXAMPLE, table=LatencyTable(cache=tmp_path))
    assert all(layer.ms is not None and layer.ms > 0 for layer in measured.layers)
    assert [layer.weight for layer in measured.layers] == [layer.weight for layer in groups.layers]
    assert measured.groups == groups.groups
    half = {group.name: torch.arange(8) < 4 for group in measured.free}
    assert 0 < kept_share(measured, half).latency < 1


def test_the_sizes_that_groups_can_leave_are_timed_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    _whole_takes(1e9, monkeypatch)
    model, table = _network(), Stopwatch()
    groups = sk.measure_layers(model, find_groups(model, EXAMPLE), EXAMPLE, table=table)
    curves = [layer.curve for layer in groups.layers]
    assert [curve and curve.sizes for curve in curves] == [
        ((4, 8), (3,)),
        ((4, 8), (4, 8)),
        ((4, 8), (4, 8)),
        ((4,), (1, 3, 5, 8)),  # a product has no blocks
    ]
    shapes = {(o.input_shape[:2], o.weight_shape[:2]) for o in table.asked if o.strides}
    assert shapes == {((2, i), (o, i)) for i in (3, 4, 8) for o in (4, 8)}


class Block(nn.Module):
    """A residual block whose widths a group norm holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(self.norm(x))


def test_a_block_that_can_go_leaves_no_sizes_to_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    _whole_takes(1e9, monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), nn.Conv2d(8, 4, 3))
    groups = find_groups(model, EXAMPLE, blocks="all")
    assert [group.name for group in groups.free] == ["1"]
    curves = [x.curve for x in sk.measure_layers(model, groups, EXAMPLE, table=Stopwatch()).layers]
    assert [curve and curve.sizes for curve in curves] == [((8,), (3,)), ((8,), (8,)), ((4,), (8,))]


def test_the_whole_models_time_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, table = _network(), Stopwatch()
    groups = find_groups(model, EXAMPLE)
    kernels = [2 * 64 * 8 * 27, 2 * 64 * 8 * 72, 2 * 64 * 8 * 72, 2 * 32]
    elements = [2 * 8 * 64] * 3 + [2 * 4]
    for more in (0.0, 1000.0):
        _whole_takes(sum(kernels) + more, monkeypatch)
        layers = sk.measure_layers(model, groups, EXAMPLE, table=table).layers
        expected = [k + more * e / sum(elements) for k, e in zip(kernels, elements, strict=True)]
        assert [layer.ms for layer in layers] == pytest.approx(expected)
    _whole_takes(sum(kernels) / 2, monkeypatch)  # kernels that are faster in the model than side by side
    layers = sk.measure_layers(model, groups, EXAMPLE, table=table).layers
    assert [layer.ms for layer in layers] == pytest.approx([k / 2 for k in kernels])


def test_predicted_shares_are_those_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that are products of sizes are interpolated exactly: then latency is multiply-accumulates."""
    _whole_takes(2 * 64 * 8 * (27 + 72 + 72) + 2 * 32, monkeypatch)
    model = _network()
    groups = sk.measure_layers(model, find_groups(model, EXAMPLE), EXAMPLE, table=Stopwatch())
    masks = {group.name: torch.arange(8) < 4 for group in groups.free}
    share = kept_share(groups, masks)
    assert share.latency == pytest.approx(share.macs)
    # Of 8 channels each: the first is made in 27 and read in 72, ...
    costs = list(sk.channel_latencies(groups).values())
    assert costs == pytest.approx([2 * 64 * (27 + 72), 2 * 64 * (72 + 72), 2 * 64 * 72 + 8])
    masks = sk.keep_masks(model, groups, method="budget", target={"latency": 0.5})
    assert 0.25 < kept_share(groups, masks).latency <= 0.5


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "regnety_002"]
)
def test_operators_do_what_the_layers_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers multiply as often as is counted for the model, padded and grouped as they may be."""
    _whole_takes(1e-9, monkeypatch)
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    example = torch.zeros(1, *size)
    groups = find_groups(model, example)
    table = Stopwatch()
    sk.measure_layers(model, groups, example, table=table)
    timed = {operator.key: table._one(operator) for operator in table.asked}
    for layer in groups.layers:
        assert layer.macs in timed.values(), layer


def test_a_layer_that_runs_twice_takes_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(self.layer(x).relu())
            return out

    model, once = Twice(), 2 * 64 * 3 * 27
    _whole_takes(2 * once, monkeypatch)
    (layer,) = sk.measure_layers(model, find_groups(model, EXAMPLE), EXAMPLE, table=Stopwatch()).layers
    assert layer.ms == 2 * once


@pytest.mark.parametrize("pieces", [False, True])
def test_a_grouped_convolution_is_timed_as_it_is_cut(pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses whole groups, or, where another layer's channels tie the groups' places, the same places in each."""
    torch.manual_seed(0)
    into = 32 if pieces else 4
    model = nn.Sequential(
        *(nn.Conv2d(3, into, 1), nn.BatchNorm2d(into), nn.ReLU()),
        *(nn.Conv2d(into, 32, 3, padding=1, groups=4), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    )
    _whole_takes(1e9, monkeypatch)
    table = Stopwatch()
    groups = sk.measure_layers(model, find_groups(model, EXAMPLE), EXAMPLE, table=table)
    layer = next(layer for layer in groups.layers if layer.weight == "3.weight")
    assert layer.curve is not None
    curve = replace(layer.curve, beside_ms=0.0)
    masks = {g.name: torch.arange(g.n_channels) < g.n_channels // 2 for g in groups.free}
    assert masks
    cut = sk.apply_plan(model, sk.make_plan(groups, masks))[3]
    assert cut.weight.shape[0] == 16
    assert float(curve.at(*cut.weight.shape[:2])) == pytest.approx(2 * 64 * cut.weight.numel())
    timed = {o.conv_groups for o in table.asked if o.weight_shape[2:] == (3, 3)}
    assert timed == ({4} if cut.groups == 4 else {1, 2, 4})


def test_a_layer_that_is_called_by_keyword_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(input=x.mean((2, 3)))
            return out

    model = Named()
    _whole_takes(24.0, monkeypatch)
    (layer,) = sk.measure_layers(model, find_groups(model, EXAMPLE), EXAMPLE, table=Stopwatch()).layers
    assert layer.ms == 24.0


def test_layers_of_other_kinds_get_time_by_their_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))
    groups = find_groups(model, EXAMPLE)
    _whole_takes(1.0, monkeypatch)
    conv, transposed = sk.measure_layers(model, groups, EXAMPLE, table=Stopwatch()).layers
    assert conv.ms is not None
    assert transposed.ms is not None
    assert conv.ms + transposed.ms == pytest.approx(1.0)
    assert transposed.ms / conv.ms == pytest.approx(transposed.macs / conv.macs)


def test_latencies_that_were_not_measured_are_refused() -> None:
    model = _network()
    groups = find_groups(model, EXAMPLE)
    with pytest.raises(InputError, match="measure_layers"):
        sk.channel_latencies(groups)
    with pytest.raises(InputError, match="measure_layers"):
        sk.keep_masks(model, groups, method="budget", target={"latency": 0.5})
    with pytest.raises(InputError, match="measure_layers"):
        sparsifier_of(model, groups, strength="auto", total_steps=10, target={"latency": 0.5})
    with pytest.raises(InputError, match="table is of 2 threads, and 1 were asked for"):
        sk.measure_layers(model, groups, EXAMPLE, table=Stopwatch(threads=2))
    with pytest.raises(InputError, match="no layer"):
        sk.measure_layers(nn.Sequential(nn.Conv2d(3, 8, 3)), groups, EXAMPLE)
