"""Describe the machine: processor, cores, vector instructions, memory, load, and library versions.

Every report holds these, because a latency means nothing without them.
"""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import sparsekit
from sparsekit.errors import InputError

__all__ = [
    "channel_multiple",
    "check_threads",
    "conv_step",
    "describe_machine",
    "library_versions",
    "usable_cores",
]

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_LIBRARIES = (
    "torch", "torchvision", "timm", "torch-pruning", "accelerate", "numpy", "onnx", "onnxscript",
    "onnxruntime", "safetensors", "pydantic",
)  # fmt: skip
# The instruction sets that decide which ONNX Runtime and PyTorch kernels run; the names are Linux's.
_SIMD = (
    "sse4_1", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
_TORCH_CAPABILITY = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512f"]}


def describe_machine() -> dict[str, Any]:
    """Return what a reader needs to judge a latency, as plain data.

    Keys: `cpu` (model name), `physical_cores` and `logical_cores` (those this process may use), `simd` (list
    of instruction sets in Linux's spelling), `memory_bytes` (installed, or the container's limit; None if
    unknown), `load_average` (1, 5 and 15 minutes; None where the system keeps none), `os`, `python`.
    """
    processors = _processors()
    return {
        "cpu": _cpu_model(processors),
        "physical_cores": _physical_cores(processors),
        "logical_cores": usable_cores(),
        "simd": _simd(processors),
        "memory_bytes": _memory_bytes(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on; those not installed are left out."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"sparsekit": sparsekit.__version__}


def usable_cores() -> int:
    """Return how many logical cores this process may use: the lesser of affinity and container quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        return max(1, min(affinity, math.ceil(int(quota) / int(period))))
    return affinity


def check_threads(threads: int) -> None:
    """Raise InputError unless 1 <= `threads` <= `usable_cores()`; more threads would wait for each other."""
    cores = usable_cores()
    if not 1 <= threads <= cores:
        raise InputError(
            f"threads must be between 1 and {cores} (the cores this process may use), got {threads}"
        )


def channel_multiple() -> int:
    """Return the multiple to round channel counts to: 16 with AVX-512, 8 otherwise.

    ONNX Runtime's blocked convolution layout (NCHWc) pads channels to it, so that a count between two multiples costs
    as much as the next one. Source: `NchwcBlockSize` in onnxruntime/core/mlas/lib/platform.cpp.
    """
    return 16 if "avx512f" in _simd(_processors()) else 8


@cache
def conv_step() -> int:
    """Return the step in which a convolution's latency rises with its channels here; 1 where it rises steadily.

    It rises in steps of `channel_multiple` where ONNX Runtime has its blocked layout. That is taken to be on x86 with
    AVX only; whether it was built with one for another processor is not known here.
    """
    return channel_multiple() if "avx" in _simd(_processors()) else 1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _processors() -> list[dict[str, str]]:
    """Return a field-to-value mapping for each logical processor of /proc/cpuinfo; empty without it."""
    entries = (entry.splitlines() for entry in _read(_CPUINFO).split("\n\n"))
    parsed = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        for lines in entries
    ]
    return [fields for fields in parsed if "processor" in fields]


def _cpu_model(processors: list[dict[str, str]]) -> str:
    named = processors[0].get("model name", "") if processors else ""
    return named or platform.processor() or platform.machine() or "unknown"


def _physical_cores(processors: list[dict[str, str]]) -> int:
    """Return how many physical cores the logical ones are; their own number where the system does not tell."""
    logical = usable_cores()
    if not hasattr(os, "sched_getaffinity"):
        return logical
    allowed = os.sched_getaffinity(0)
    mine = [fields for fields in processors if int(fields["processor"]) in allowed]
    if not mine or any("core id" not in fields for fields in mine):
        return logical
    return min(logical, len({(fields.get("physical id"), fields["core id"]) for fields in mine}))


def _simd(processors: list[dict[str, str]]) -> list[str]:
    if processors:
        flags = set((processors[0].get("flags") or processors[0].get("Features") or "").split())
        return [name for name in _SIMD if name in flags]
    import torch  # only where there is no /proc/cpuinfo: the import takes seconds

    return list(_TORCH_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), []))


def _memory_bytes() -> int | None:
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _read(_CGROUP / "memory.max")
    return min(installed, int(limit)) if limit.isdigit() else installed
