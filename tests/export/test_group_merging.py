"""Merged groups compute what the groups did, and lie in ONNX Runtime's blocked layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from plain import find_groups
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.export import onnx_file as export
from sparsekit.export.graph_summary import summarise_graph
from sparsekit.export.group_merging import merge_factor, merge_groups_
from sparsekit.export.session import open_session
from sparsekit.latency import layers as layer_latency
from sparsekit.latency.operators import Operator
from sparsekit.latency.table import LatencyTable
from sparsekit.machine import conv_step


@pytest.fixture(autouse=True)
def steps_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor runs the tests."""
    monkeypatch.setattr(export, "conv_step", lambda: 16)
    monkeypatch.setattr(layer_latency, "conv_step", lambda: 16)


@pytest.mark.parametrize(
    ("inputs", "outputs", "step", "factor"),
    [
        (8, 8, 16, 2),
        (4, 4, 16, 4),
        (4, 4, 8, 2),
        (8, 16, 16, 2),
        (16, 8, 16, 2),
        (16, 16, 16, 1),  # whole steps already
        (32, 16, 16, 1),
        (1, 1, 16, 1),  # depthwise has kernels of its own
        (2, 2, 16, 1),  # eight times as much to multiply
        (24, 24, 16, 1),  # would be three steps
        (12, 12, 16, 1),
        (5, 5, 16, 1),
    ],
)
def test_how_many_groups_make_whole_steps(inputs: int, outputs: int, step: int, factor: int) -> None:
    assert merge_factor(inputs, outputs, step) == factor


def _files(model: nn.Module, example: Tensor, folder: Path) -> tuple[Path, Path]:
    return (
        sk.export_onnx(model, folder / "plain.onnx", example, merge_groups=False),
        sk.export_onnx(model, folder / "merged.onnx", example),
    )


def _outputs(file: Path, images: Tensor) -> np.ndarray:
    session = open_session(file)
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    return found


def _conv_groups(file: Path) -> list[int]:
    return [
        attribute.i
        for node in onnx.load(file).graph.node
        if node.op_type == "Conv"
        for attribute in node.attribute
        if attribute.name == "group"
    ]


@pytest.mark.parametrize(
    ("inputs", "outputs", "conv_groups", "merged"),
    [(32, 32, 4, 2), (48, 48, 12, 3), (16, 16, 2, 1), (32, 64, 4, 2), (24, 24, 3, 3), (32, 32, 1, 1)],
)
def test_the_file_computes_the_same_in_fewer_groups(
    inputs: int, outputs: int, conv_groups: int, merged: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, dilation=1, groups=conv_groups).eval()
    images = torch.randn(2, inputs, 9, 7)
    plain, file = _files(model, images, tmp_path)
    assert _conv_groups(plain) == [conv_groups]
    assert _conv_groups(file) == [merged]
    with torch.no_grad():
        wanted = model(images).numpy()
    np.testing.assert_allclose(_outputs(file, images), wanted, atol=1e-5)
    np.testing.assert_allclose(_outputs(plain, images), wanted, atol=1e-5)


class _Odd(nn.Module):
    """Convolutions whose weights are no constants of one layer, and one that is not 2-d."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.line = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.scale = nn.Linear(16, 16 * 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(x))
        computed = self.scale(x.mean((0, 2, 3))).reshape(16, 8, 1, 1)
        x = F.conv2d(x, computed, groups=2)
        lines: Tensor = self.line(x.flatten(2))
        return lines


def test_weights_that_are_shared_or_computed_and_other_dimensions_are_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = _Odd().eval(), torch.randn(1, 16, 8, 8)
    plain, file = _files(model, images, tmp_path)
    assert _conv_groups(file) == _conv_groups(plain) == [2, 2, 2, 2]
    np.testing.assert_array_equal(_outputs(plain, images), _outputs(file, images))


def test_merging_again_changes_nothing(tmp_path: Path) -> None:
    file = sk.export_onnx(nn.Conv2d(32, 32, 3, groups=4), tmp_path / "model.onnx", torch.zeros(1, 32, 8, 8))
    proto = onnx.load(file)
    before = proto.SerializeToString()
    assert merge_groups_(proto, 16) == 0
    assert proto.SerializeToString() == before


def _regular() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 104, 1), nn.ReLU(), nn.Conv2d(104, 96, 1), nn.ReLU()),
        *(
            nn.Conv2d(96, 96, 3, padding=1, groups=12),
            nn.ReLU(),
            nn.Conv2d(96, 32, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 4),
        ),
    ).eval()


def test_merged_groups_lie_in_the_blocked_layout(tmp_path: Path) -> None:
    if conv_step() != 16:
        pytest.skip("steps of another size on this processor")
    plain, merged = (summarise_graph(file) for file in _files(_regular(), torch.zeros(1, 3, 8, 8), tmp_path))
    assert (plain.plain, merged.plain) == (1, 0)
    assert merged.reorders < plain.reorders


class Noting(LatencyTable):
    """Notes the operators that it is asked for; all take as long."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache=cache)
        self.asked: list[Operator] = []

    def ms(self, operators: Sequence[Operator], **_: object) -> list[float]:
        self.asked.extend(operators)
        return [1.0] * len(operators)

    def conv_step(self) -> int:
        return 16

    def product_step(self) -> int:
        return 1


def test_layers_are_timed_as_they_are_exported(tmp_path: Path) -> None:
    """The operators of the whole model are those of its file; the sizes in between are whole merged groups."""
    model, example = _regular(), torch.zeros(1, 3, 8, 8)
    table = Noting(cache=tmp_path)
    measured = sk.measure_layers(model, find_groups(model, example), example, table=table)
    timed = {(operator.weight_shape, operator.conv_groups) for operator in table.asked if operator.strides}
    graph = onnx.load(sk.export_onnx(model, tmp_path / "model.onnx", example)).graph
    dims = {initializer.name: tuple(initializer.dims) for initializer in graph.initializer}
    written = {
        (dims[node.input[1]], next(a.i for a in node.attribute if a.name == "group"))
        for node in graph.node
        if node.op_type == "Conv"
    }
    assert written <= timed
    grouped = {
        (shape[:2], conv_groups) for shape, conv_groups in timed if shape[2:] == (3, 3) and shape[1] != 3
    }
    assert grouped == {((n, 16), n // 16) for n in (16, 32, 64, 96)}
    layer = next(layer for layer in measured.layers if layer.weight == "6.weight")
    assert layer.curve is not None
    assert layer.curve.steps == (16, 1)


def test_a_number_of_groups_that_does_not_fit_is_timed_as_it_stands(tmp_path: Path) -> None:
    """13 groups of 8 cannot be merged in pairs; 12 can, and 12 are what a cut should leave."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 104, 1), nn.ReLU(), nn.Conv2d(104, 104, 3, padding=1, groups=13), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(104, 4)),
    ).eval()
    example = torch.zeros(1, 3, 8, 8)
    table = Noting(cache=tmp_path)
    groups = find_groups(model, example, round_to="auto")
    measured = sk.measure_layers(model, groups, example, table=table)
    grouped = {
        (operator.weight_shape[:2], operator.conv_groups)
        for operator in table.asked
        if operator.conv_groups > 1
    }
    assert grouped >= {((104, 8), 13), ((96, 16), 6)}
    assert all(inputs == 16 or outputs == 104 for (outputs, inputs), _ in grouped)
    assert measured["0"].rounding == sk.Rounding(16 // 8, 1)
