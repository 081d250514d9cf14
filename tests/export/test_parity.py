"""Parity sees differences where there are any; accuracy through ONNX counts every image once."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsekit.errors import DataError, FileError, VerificationError
from sparsekit.export.onnx_file import export_onnx
from sparsekit.export.parity import Parity, check_parity, onnx_accuracy, onnx_logits


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    ).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("onnx"), _model()
    return {
        "batch 1": export_onnx(model, folder / "one.onnx", torch.randn(1, 3, 6, 6)),
        "batch 4": export_onnx(model, folder / "four.onnx", torch.randn(4, 3, 6, 6)),
        "open": export_onnx(model, folder / "open.onnx", torch.randn(1, 3, 6, 6), dynamic_batch=True),
    }


def _images(count: int = 10) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["batch 1", "batch 4", "open"])
def test_logits_come_in_the_batches_given(kind: str, files: dict[str, Path]) -> None:
    batches = [_images(7), _images(4), _images(1)]
    found = list(onnx_logits(files[kind], batches))
    assert [len(logits) for logits in found] == [7, 4, 1]
    for logits, images in zip(found, batches, strict=True):
        torch.testing.assert_close(logits, _model()(images).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["batch 1", "batch 4", "open"])
def test_same_model_agrees(kind: str, files: dict[str, Path]) -> None:
    parity = check_parity(_model(), files[kind], _images())
    assert 0 <= parity.max_rel < 1e-5
    assert parity.top1_agreement == 1
    assert Parity(**json.loads(json.dumps(parity.to_json()))) == parity


def test_a_known_difference_is_reported_exactly(files: dict[str, Path]) -> None:
    model, images = _model(), _images()
    with torch.no_grad():
        model[-1].bias[2] += 0.25
        largest = float(model(images).abs().max())
    parity = check_parity(model, files["open"], images)
    assert parity.max_abs == pytest.approx(0.25, rel=1e-4)
    assert parity.max_rel == pytest.approx(0.25 / largest, rel=1e-4)
    with torch.no_grad():
        model[-1].bias[2] += 100 * largest
    assert check_parity(model, files["open"], images).top1_agreement < 1


def test_model_gets_its_modes_back(files: dict[str, Path]) -> None:
    model = _model().train()
    model[1].eval()
    before, state = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    assert check_parity(model, files["batch 4"], _images()).max_rel < 1e-5
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_disagreements_that_are_no_numbers_are_errors(files: dict[str, Path]) -> None:
    model = _model()
    with torch.no_grad():
        model[-1].bias[0] = float("nan")
    with pytest.raises(VerificationError, match="NaN"):
        check_parity(model, files["open"], _images())
    model[-1] = nn.Linear(8 * 16, 6)
    with pytest.raises(VerificationError, match="another model"):
        check_parity(model, files["open"], _images())


@pytest.mark.parametrize("kind", ["batch 1", "batch 4", "open"])
def test_accuracy_counts_every_image_once(kind: str, files: dict[str, Path]) -> None:
    images = _images(11)
    labels = _model()(images).argmax(1)
    labels[[0, 6, 10]] = (labels[[0, 6, 10]] + 1) % 5
    loader = [(images[start : start + 6], labels[start : start + 6]) for start in (0, 6)]
    assert onnx_accuracy(files[kind], loader) == pytest.approx(8 / 11)


def test_bad_data_and_files(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one image"):
        onnx_accuracy(files["open"], [])
    with pytest.raises(DataError, match="at least one input"):
        check_parity(_model(), files["open"], _images(0))
    with pytest.raises(FileError, match="export it for this size"):
        onnx_accuracy(files["open"], [(torch.randn(2, 3, 7, 7), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(FileError, match="export it for this size"):
        list(onnx_logits(files["open"], [torch.randn(3, 6, 6)]))
    with pytest.raises(FileError, match="does not exist"):
        check_parity(_model(), tmp_path / "missing.onnx", _images())
