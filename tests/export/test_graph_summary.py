"""The summary against graphs whose convolutions fit ONNX Runtime's blocked layout, or do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.errors import FileError
from sparsekit.export.graph_summary import GraphSummary, summarise_graph


def _summary(model: nn.Module, folder: Path) -> GraphSummary:
    return summarise_graph(sk.export_onnx(model, folder / "model.onnx", torch.zeros(1, 3, 16, 16)))


def _stack(width: int, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), activation()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), activation()),
    )


def test_fused_and_blocked_convolutions_leave_nothing_else(tmp_path: Path) -> None:
    summary = _summary(_stack(32, nn.ReLU), tmp_path)
    assert summary.blocked + summary.plain == 2
    assert summary.activations == summary.norms == 0
    assert summary.operators == 2 + summary.reorders
    if not summary.blocked:
        pytest.skip("no blocked layout on this processor")
    # Of 31 channels the second convolution cannot read blocks.
    odd = _summary(_stack(31, nn.ReLU), tmp_path)
    assert (odd.blocked, odd.plain) == (1, 1)


def test_what_is_not_fused_is_counted(tmp_path: Path) -> None:
    assert _summary(_stack(32, nn.GELU), tmp_path).activations == 2
    behind = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3))
    assert _summary(behind, tmp_path).norms == 1


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(FileError, match="cannot be loaded"):
        summarise_graph(tmp_path / "model.onnx")
