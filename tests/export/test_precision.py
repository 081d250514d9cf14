"""Files in fewer bits: smaller, nearly the same answers, the same names and metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.errors import DataError, ModelError
from sparsekit.export.onnx_file import read_metadata
from sparsekit.export.parity import onnx_logits
from sparsekit.export.precision import convert_to_fp16, quantize_to_int8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    path = tmp_path_factory.mktemp("quantize") / "model.onnx"
    return sk.export_onnx(model, path, torch.zeros(2, 3, 16, 16), metadata={"classes": "ten"})


def _images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def _bits_of_weights(path: Path) -> int:
    weights = [w for w in onnx.load(path).graph.initializer if len(w.dims) == 4]
    assert weights
    return max(8 * onnx.helper.tensor_dtype_to_np_dtype(w.data_type).itemsize for w in weights)


@pytest.mark.parametrize(("precision", "bits", "error"), [("int8", 8, 0.05), ("fp16", 16, 0.005)])
def test_fewer_bits_give_nearly_the_same_answers(
    precision: str, bits: int, error: float, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"model.{precision}.onnx"
    if precision == "int8":
        assert quantize_to_int8(source, target, [_images(16), _images(15, seed=1)]) == target
    else:
        assert convert_to_fp16(source, target) == target
    assert capsys.readouterr().out == ""
    assert _bits_of_weights(target) == bits
    assert target.stat().st_size < source.stat().st_size
    assert read_metadata(target) == {"classes": "ten"}
    images = _images(32, seed=2)
    ours, theirs = (torch.cat(list(onnx_logits(path, [images]))) for path in (source, target))
    assert float((ours - theirs).abs().max()) < error * float(ours.abs().max())
    assert float((ours - theirs).abs().max()) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [target.name]


def test_weights_have_a_scale_for_each_channel(source: Path, tmp_path: Path) -> None:
    graph = onnx.load(quantize_to_int8(source, tmp_path / "int8.onnx", [_images(8)])).graph
    scales = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer if w.name.endswith("_scale")}
    assert {len(np.atleast_1d(scale)) for scale in scales.values()} >= {32, 64}


def test_batches_smaller_than_the_file_s_are_put_together(source: Path, tmp_path: Path) -> None:
    """The file takes two images at once."""
    assert quantize_to_int8(
        source, tmp_path / "int8.onnx", [_images(1), _images(1, seed=1), _images(1)]
    ).exists()


def test_too_few_images_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs images to calibrate with"):
        quantize_to_int8(source, tmp_path / "int8.onnx", [_images(1)])
    assert not list(tmp_path.iterdir())


def test_a_graph_that_the_tools_refuse_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no shape")

    monkeypatch.setattr("onnxruntime.quantization.shape_inference.quant_pre_process", fail)
    with pytest.raises(ModelError, match=r"cannot quantize .*no shape.*leave int8 out"):
        quantize_to_int8(source, tmp_path / "int8.onnx", [_images(8)])
    assert not list(tmp_path.iterdir())
