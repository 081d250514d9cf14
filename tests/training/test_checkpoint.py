from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsekit.errors import FileError
from sparsekit.training.checkpoint import load_state, save_state


def same(a: object, b: object) -> bool:
    """Equality that also compares types, tensors bit by bit, and lets NaN equal NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        "text",
        [],
        {},
        (),
        torch.tensor(2.5),
        torch.empty(0, 3),
        {"a": [1, 2.5, None, True, "x"], 7: (1, (2,), []), "7": {"deep": {0: [{}]}}},
        {"nan": math.nan, "inf": [math.inf, -math.inf], "tiny": 5e-324, "pi": math.pi, "big": 2**70},
        ["tensor", "0"],
        ["float", "nan"],
        {"bf16": torch.ones(2, dtype=torch.bfloat16), "bool": torch.tensor([True]), "int": torch.arange(3)},
    ],
    ids=lambda state: str(state)[:30],
)
def test_state_round_trips(tmp_path: Path, state: object) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, state)
    assert same(load_state(path), state)


def test_shared_and_strided_tensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"base": base, "again": base, "view": base[1:], "transposed": base.t(), "images": images}
    state["parameter"] = torch.nn.Parameter(base)
    save_state(tmp_path / "s", state)
    loaded = load_state(tmp_path / "s")
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_optimizer_state_round_trips(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "s", optimizer.state_dict())
    assert same(load_state(tmp_path / "s"), optimizer.state_dict())


@pytest.mark.parametrize(
    "value",
    [object(), {1.5: 1}, {True: 1}, {1, 2}, b"bytes"],
    ids=["object", "float", "bool", "set", "bytes"],
)
def test_what_cannot_be_stored_is_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    save_state(tmp_path / "s", "old")
    with pytest.raises(TypeError, match=r"state\['x'\]\[0\]"):
        save_state(tmp_path / "s", {"x": [value]})
    assert load_state(tmp_path / "s") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("size", [0, 5, 60, -7])
def test_a_damaged_file_is_an_error_not_a_crash(tmp_path: Path, size: int) -> None:
    path = tmp_path / "s"
    save_state(path, {"w": torch.randn(10), "n": 1})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileError, match="damaged"):
        load_state(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        load_state(tmp_path / "none")
    save_file({"w": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(FileError, match="not a training state"):
        load_state(tmp_path / "weights.safetensors")
