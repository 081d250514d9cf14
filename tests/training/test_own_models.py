"""Networks of one's own: which function is found, what it is called with, and what it may return."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsekit.errors import ModelError
from sparsekit.training.own_models import (
    call_arguments,
    create_own_model,
    hashes_of_code,
    import_function,
)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into the current folder; what was imported from there is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str, name: str = "nets.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"from torch import nn\nimport torch\n{text}\n")
        return path

    yield write
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_function_is_found_in_the_current_folder_and_in_folders_below_it(write: Write) -> None:
    write("def build(): return nn.ReLU()")
    write("def build(): return nn.Tanh()", "mynets/tanh.py")
    assert isinstance(create_own_model("nets:build", {}), nn.ReLU)
    assert isinstance(create_own_model("mynets.tanh:build", {}), nn.Tanh)
    assert isinstance(create_own_model("torch.nn:Sigmoid", {}), nn.Sigmoid)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nest:build", r"there is no module nest in /.* or among what is installed; did you mean nets\?"),
        (
            "nets.resnet:build",
            r"there is no module nets\.resnet in /.*; start|there is no module nets\.resnet .*nets\?",
        ),
        ("nets:bild", r"nets\.py has no function bild; did you mean build\?"),
        ("nets:x", r"nets\.py has no function x; it has build"),
        ("nets:width", r"width of nets\.py must be a function that builds the model, got int"),
        ("nets:network", r"network of nets\.py must be a function that builds the model, got ReLU"),
    ],
)
def test_what_is_no_function_is_told(write: Write, reference: str, message: str) -> None:
    write("width = 3\nnetwork = nn.ReLU()\ndef build(): return network")
    with pytest.raises(ModelError, match=message):
        import_function(reference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere", r"bad cannot be imported: ModuleNotFoundError: .*'nowhere' \(bad\.py, line 3\)"),
        ("1 / 0", r"bad cannot be imported: ZeroDivisionError: division by zero \(bad\.py, line 3\)"),
        ("raise SystemExit(3)", r"bad cannot be imported: SystemExit: 3 \(bad\.py, line 3\)"),
        ("def build(:", r"bad cannot be imported: SyntaxError: .*bad\.py, line 3"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_its_line(
    write: Write, text: str, message: str
) -> None:
    write(text, "bad.py")
    with pytest.raises(ModelError, match=message):
        import_function("bad:build")


def test_a_function_is_offered_the_parameters_that_it_names_and_gets_all_arguments(write: Write) -> None:
    write("def build(num_classes, *, in_chans=3, layers=(), **others): ...\ndef loose(**others): ...")
    offered = {"num_classes": 10, "in_chans": 1, "img_size": 32}
    layers = [{"width": 8, "sizes": [3, [5, None]]}]
    found = call_arguments("nets:build", {"layers": layers, "dropout": 0.1}, offered)
    assert found == {"num_classes": 10, "in_chans": 1, "layers": layers, "dropout": 0.1}
    assert found["layers"] is not layers  # what a function does to its arguments stays with it
    assert call_arguments("nets:build", {"num_classes": 3}, offered) == {"num_classes": 3, "in_chans": 1}
    assert call_arguments("nets:build", {"num_classes": 3}, {"in_chans": None}) == {"num_classes": 3}
    assert call_arguments("nets:loose", {"a": 1}, offered) == {"a": 1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"widht": 3}, "build has no parameter widht; it has num_classes, width"),
        ({}, "build needs width, and nothing says it; set it here"),
    ],
)
def test_arguments_that_do_not_fit_the_signature_are_told(
    write: Write, args: dict[str, int], message: str
) -> None:
    write("def build(num_classes, width): ...")
    with pytest.raises(ModelError, match=message):
        call_arguments("nets:build", args, {"num_classes": 10})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError(size)", r"called with \(size=3\) it failed: ValueError: 3 \(nets\.py, line 4\)"),
        ("exit(4)", r"called with \(size=3\) it failed: SystemExit: 4 \(nets\.py, line 4\)"),
        ("return nn.Conv2d(size, 8, -1)", r"it failed: .* \(nets\.py, line 4\)"),
        ("return {}", "it must return a torch.nn.Module, got dict"),
        ("pass", "it must return a torch.nn.Module, got NoneType"),
        ("return nn.LazyLinear(size)", r"lazy layers, whose sizes are not known \(weight, bias\)"),
    ],
)
def test_a_function_that_gives_no_model_is_told(write: Write, body: str, message: str) -> None:
    write(f"def build(size):\n    {body}")
    with pytest.raises(ModelError, match=message):
        create_own_model("nets:build", {"size": 3})


def test_a_function_that_returns_the_same_module_twice_gives_two_models(write: Write) -> None:
    write("network = nn.Linear(2, 2)\ndef build(): return network")
    first, second = (create_own_model("nets:build", {}) for _ in range(2))
    first.weight.data.zero_()
    assert bool(second.weight.any())
    assert bool(create_own_model("nets:build", {}).weight.any())


def test_the_code_of_a_model_is_that_of_its_function_and_layers_without_what_is_installed(
    write: Write,
) -> None:
    layer = write("class Layer(nn.Linear): pass", "layers.py")
    inner = write("from layers import Layer\ndef make(): return nn.Sequential(Layer(2, 2))", "inner.py")
    outer = write("from inner import make as build", "outer.py")
    found = hashes_of_code("outer:build", create_own_model("outer:build", {}))
    expected = {"inner": inner, "layers": layer, "outer": outer}
    assert found == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in expected.items()}


def test_the_caller_s_seed_decides_the_weights(write: Write) -> None:
    write("def build(): return nn.Linear(2, 2)")
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(create_own_model("nets:build", {}).weight)
    assert torch.equal(*weights)
