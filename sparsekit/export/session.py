"""Open an ONNX file in ONNX Runtime, the same way for accuracy, parity and latency."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnxruntime

from sparsekit.errors import FileError, InputError
from sparsekit.machine import check_threads
from sparsekit.options import Provider

__all__ = ["Provider", "check_provider", "open_session"]

# Our name -> ONNX Runtime's, and the package that has it.
_PROVIDERS: Mapping[Provider, tuple[str, str]] = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu, with TensorRT"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime on macOS"),
    "directml": ("DmlExecutionProvider", "onnxruntime-directml on Windows"),
}
_FATAL_ONLY = 4


def check_provider(provider: Provider) -> None:
    """Raise InputError unless the installed ONNX Runtime has the execution provider."""
    if provider not in _PROVIDERS:
        raise InputError(f"provider must be one of {', '.join(_PROVIDERS)}, got {provider!r}")
    name, package = _PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise InputError(
            f"provider {provider} is not in the ONNX Runtime that is installed; in its place install {package}"
        )


def open_session(
    path: str | os.PathLike[str],
    *,
    threads: int = 1,
    provider: Provider = "cpu",
    profile: Path | None = None,
    optimised: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Load the ONNX file `path` for a provider, all graph optimisations on, `threads` threads in each operator.

    Operators run one after another. Threads do not spin while they wait: two sessions would steal each other's cores.
    Nothing is printed. With `profile`, the beginning of a file's name, each operator is timed; the session's
    `end_profiling()` writes the file. The optimised graph is written to `optimised`.

    Raises:
        FileError: `path` is missing, is no ONNX file, or ONNX Runtime cannot load it.
        InputError: `threads` is below 1 or above the number of usable cores, or the provider is not installed, or
            does not start.
    """
    check_threads(threads)
    check_provider(provider)
    file = Path(path)
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise FileError(f"ONNX file {file} {what}; give the path of a .onnx file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    wanted = _PROVIDERS[provider][0]
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=list(dict.fromkeys([wanted, "CPUExecutionProvider"]))
        )
    # ONNX Runtime's exceptions have no common base but Exception.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"{file} cannot be loaded as an ONNX model: {reason}; "
            "it is damaged or not an ONNX file, export it again"
        ) from error
    # ONNX Runtime goes on without a provider that fails to start, for want of a driver or a library.
    if session.get_providers()[0] != wanted:
        raise InputError(
            f"provider {provider} is installed but does not start; see that its driver and libraries are"
        )
    return session
