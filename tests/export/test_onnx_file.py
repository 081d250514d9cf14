"""The ONNX file computes what the model computes, is self-contained, and the model does not notice."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparsekit.errors import FileError, InputError, ModelError
from sparsekit.export.onnx_file import export_onnx, read_metadata
from sparsekit.export.session import open_session
from sparsekit.machine import usable_cores


def _small(train: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8) + 1)
    return model.train(train)


def _run(path: Path, *inputs: Tensor) -> Tensor:
    session = open_session(path)
    names = [entry.name for entry in session.get_inputs()]
    fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, fed)[0])


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        out: Tensor = self.head(image.mean((2, 3)) + self.embed(label))
        return out


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1


class _Caching(nn.Module):
    """Keeps a tensor made from its weight in eval mode and drops it in train(), as some timm models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> _Caching:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * (2 * self.weight)
        if "w" not in self.cache:
            self.cache["w"] = 2 * self.weight
        return x * self.cache["w"]


def test_file_computes_the_model_and_is_self_contained(tmp_path: Path) -> None:
    model, images = _small(), torch.randn(1, 3, 8, 8)
    path = export_onnx(model, tmp_path / "m.onnx", images)
    torch.testing.assert_close(_run(path, images), model(images).detach(), rtol=1e-5, atol=1e-6)
    proto = onnx.load(path)
    operators = {node.op_type for node in proto.graph.node}
    assert "BatchNormalization" not in operators
    assert "Dropout" not in operators
    assert [value.name for value in proto.graph.input] == ["input"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    assert [size.dim_value for size in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_file_holds_no_paths_of_this_machine(tmp_path: Path) -> None:
    path = export_onnx(_small(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    assert str(Path(__file__).parent).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_timm_families(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **({"img_size": 32} if "vit" in name else {})).eval()
    images = torch.randn(1, 3, 32, 32)
    path = export_onnx(model, tmp_path / "m.onnx", images)
    with torch.no_grad():
        torch.testing.assert_close(_run(path, images), model(images), rtol=1e-4, atol=1e-5)
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("example_batch", [1, 3])
def test_dynamic_batch_takes_any_batch(example_batch: int, tmp_path: Path) -> None:
    model = _small()
    path = export_onnx(model, tmp_path / "m.onnx", torch.randn(example_batch, 3, 8, 8), dynamic_batch=True)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(_run(path, images), model(images).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_several_inputs(dynamic: bool, tmp_path: Path) -> None:
    model = _TwoInputs()
    example = (torch.randn(2, 6, 4, 4), torch.tensor([1, 3]))
    path = export_onnx(
        model, tmp_path / "m.onnx", example, input_names=("image", "label"), dynamic_batch=dynamic
    )
    torch.testing.assert_close(_run(path, *example), model(*example).detach())
    if dynamic:
        other = (torch.randn(5, 6, 4, 4), torch.tensor([0, 1, 2, 3, 0]))
        torch.testing.assert_close(_run(path, *other), model(*other).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, images = _small().to(dtype), torch.randn(1, 3, 8, 8).to(dtype)
    path = export_onnx(model, tmp_path / "m.onnx", images)
    expected = copy.deepcopy(model).float()(images.float()).detach()
    torch.testing.assert_close(_run(path, images.float()), expected, rtol=1e-5, atol=1e-6)
    assert next(model.parameters()).dtype == dtype


def test_model_mode_and_random_state_are_untouched(tmp_path: Path) -> None:
    model = _small(train=True)
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    torch_state, numpy_state, python_state = (
        torch.get_rng_state(),
        np.random.get_state()[1],
        random.getstate(),
    )
    path = export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert random.getstate() == python_state
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # The file is that of eval mode all the same.
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(_run(path, images), model.eval()(images).detach(), rtol=1e-5, atol=1e-6)


def test_stale_caches_of_eval_mode_are_not_exported(tmp_path: Path) -> None:
    model, x = _Caching().eval(), torch.randn(1, 3)
    with torch.no_grad():
        model(x)
        model.weight.fill_(5)
    path = export_onnx(model, tmp_path / "m.onnx", x)
    torch.testing.assert_close(_run(path, x), 10 * x)


def test_subnormal_weights_become_zero(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0] = 1e-40
    proto = onnx.load(export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 4)))
    arrays = [numpy_helper.to_array(entry) for entry in proto.graph.initializer]
    weight = next(array for array in arrays if array.shape == (4, 4))
    assert not any(((array != 0) & (np.abs(array) < np.finfo(np.float32).tiny)).any() for array in arrays)
    assert (weight == 0).sum() == 4


def test_metadata_round_trip(tmp_path: Path) -> None:
    metadata = {"class_names": '["cat", "dög"]', "accuracy": "0.97", "empty": ""}
    path = export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", torch.randn(1, 2), metadata=metadata)
    assert read_metadata(path) == metadata
    assert open_session(path).get_modelmeta().custom_metadata_map == metadata


def test_opset_is_the_one_asked_for_or_refused(tmp_path: Path) -> None:
    path = export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", torch.randn(1, 2), opset=18)
    assert onnx.load(path).opset_import[0].version == 18
    before = path.read_bytes()
    with pytest.raises(ModelError, match="opset 99"):
        export_onnx(nn.Linear(2, 2), path, torch.randn(1, 2), opset=99)
    assert path.read_bytes() == before


def test_untraceable_model_is_one_message_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match="_Branching cannot be exported") as caught:
        export_onnx(_Branching(), tmp_path / "m.onnx", torch.randn(1, 3))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_input_names_must_fit(tmp_path: Path) -> None:
    inputs = (torch.randn(1, 6, 4, 4), torch.tensor([1]))
    with pytest.raises(InputError, match="2 example inputs"):
        export_onnx(_TwoInputs(), tmp_path / "m.onnx", inputs, input_names=("maps",))


def test_missing_garbage_empty_and_truncated_files_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = export_onnx(nn.Linear(8, 8), tmp_path / "good.onnx", torch.randn(1, 8)).read_bytes()
    bad = {"garbage": b"this is no ONNX file" * 20, "empty": b"", "truncated": good[: len(good) // 2]}
    for name, content in bad.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(FileError, match=f"{name}.onnx"):
            open_session(path)
        with pytest.raises(FileError, match=f"{name}.onnx"):
            read_metadata(path)
    for path in (tmp_path / "missing.onnx", tmp_path):
        with pytest.raises(FileError):
            open_session(path)
        with pytest.raises(FileError):
            read_metadata(path)
    assert capfd.readouterr() == ("", "")


def test_session_refuses_more_threads_than_cores(tmp_path: Path) -> None:
    path = export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", torch.randn(1, 2))
    with pytest.raises(InputError, match="threads"):
        open_session(path, threads=usable_cores() + 1)
    assert open_session(path).get_session_options().intra_op_num_threads == 1


class _WindowedAttention(nn.Module):
    """Attention over windows as a dimension of its own, which the exporter's fused operator does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fused_attn = nn.Linear(8, 24), True

    def forward(self, windows: Tensor) -> Tensor:
        q, k, v = self.qkv(windows).unflatten(-1, (3, 2, 4)).permute(3, 0, 4, 1, 2, 5).unbind(0)
        if self.fused_attn:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        return mixed.mean((1, 2, 3))


def test_attention_that_the_exporter_does_not_know_is_written_out(tmp_path: Path) -> None:
    model, windows = _WindowedAttention().eval(), torch.randn(1, 3, 5, 8)
    path = export_onnx(model, tmp_path / "windows.onnx", windows)
    assert model.fused_attn
    (found,) = open_session(path, threads=1).run(None, {"input": windows.numpy()})
    assert np.allclose(found, model(windows).detach().numpy(), atol=1e-6)
