"""The description of the machine is complete, plain data, and consistent with itself."""

from __future__ import annotations

import json
import os

import onnxruntime
import pytest
import torch

from sparsekit import machine
from sparsekit.errors import InputError
from sparsekit.machine import (
    channel_multiple,
    check_threads,
    describe_machine,
    library_versions,
    usable_cores,
)


def test_description_is_json_and_complete() -> None:
    described = describe_machine()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert set(described) == {
        "cpu", "physical_cores", "logical_cores", "simd", "memory_bytes", "load_average", "os", "python",
    }  # fmt: skip
    assert described["cpu"]
    assert 1 <= described["physical_cores"] <= described["logical_cores"] <= (os.cpu_count() or 1)
    assert described["memory_bytes"] is None or described["memory_bytes"] > 2**20


def test_versions_are_those_of_the_imported_libraries() -> None:
    versions = library_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["onnxruntime"] == onnxruntime.__version__
    assert {"sparsekit", "timm", "torch-pruning", "onnx", "numpy"} <= set(versions)


@pytest.mark.parametrize(
    ("flags", "multiple"), [("sse4_1 avx avx2 fma", 8), ("avx2 avx512f", 16), ("asimd", 8)]
)
def test_channel_multiple_follows_the_instruction_set(
    flags: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_processors", lambda: [{"processor": "0", "flags": flags}])
    assert channel_multiple() == multiple


def test_without_cpuinfo_torch_says_which_instructions_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_processors", list)
    described = describe_machine()
    assert described["physical_cores"] == described["logical_cores"]
    assert channel_multiple() == (16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8)


def test_hyperthreads_count_as_one_physical_core(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [{"processor": str(i), "physical id": "0", "core id": "0"} for i in range(64)]
    monkeypatch.setattr(machine, "_processors", lambda: twins)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert describe_machine()["physical_cores"] == 1


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", 2), ("max 100000", 64), ("50000 100000", 1)]
)
def test_container_quota_limits_the_cores(
    quota: str, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    with open(os.path.join(tmp_path, "cpu.max"), "w", encoding="utf-8") as file:
        file.write(quota + "\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert usable_cores() == expected


def test_threads_must_fit_the_cores() -> None:
    check_threads(1)
    check_threads(usable_cores())
    for threads in (0, -1, usable_cores() + 1):
        with pytest.raises(InputError, match=f"between 1 and {usable_cores()}.*got {threads}"):
            check_threads(threads)
