"""Convert an ONNX file to fewer bits: int8 by ONNX Runtime's static quantization, or half precision."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor

from sparsekit.errors import DataError, ModelError
from sparsekit.export.quiet import quiet
from sparsekit.export.session import open_session
from sparsekit.files import atomic_path
from sparsekit.machine import describe_machine

__all__ = ["convert_to_fp16", "quantize_to_int8"]

# Processors without these add products of 8 bits in sums of 16, which can overflow.
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "asimddp", "i8mm")
_NOISY_LOGGERS = ("root",)  # where the tools log what they do


def quantize_to_int8(
    source: str | os.PathLike[str], target: str | os.PathLike[str], images: Iterable[Tensor]
) -> Path:
    """Write the float32 file `source` as `target` with int8 weights (per output channel) and uint8 activations.

    `images` are batches (n, ...) of model inputs; whole batches of the file's size are used. An activation ranges from
    the smallest to the largest value seen on them. Weights get 7 bits on processors where 8 could overflow. The graph
    holds pairs of QuantizeLinear and DequantizeLinear, which ONNX Runtime fuses. Metadata stays.

    Raises DataError if the images do not fill one batch, ModelError if the quantizer fails on the graph.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = list(_batches(source, images))
    if not batches:
        raise DataError(
            f"int8 needs images to calibrate with, at least one batch of {Path(source).name}'s size"
        )
    simd = describe_machine()["simd"]
    with TemporaryDirectory() as folder, quiet(_NOISY_LOGGERS):
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        try:
            quant_pre_process(str(source), str(prepared))
            quantize_static(
                str(prepared),
                str(quantized),
                _Reader(batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=not any(name in simd for name in _WIDE_SUMS),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime cannot quantize {source} ({type(error).__name__}: {error}); leave int8 out"
            ) from error
        return _finish(onnx.load(quantized), source, target)


def convert_to_fp16(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write the float32 file `source` as `target` in half precision; inputs and outputs stay float32.

    Raises ModelError if the graph cannot be converted.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with quiet(_NOISY_LOGGERS):
        try:
            converted = convert_float_to_float16(onnx.load(source), keep_io_types=True)
            OnnxModel(converted).topological_sort()  # it appends the casts of the inputs
        except Exception as error:
            raise ModelError(
                f"{source} cannot be converted to half precision ({type(error).__name__}: {error}); leave fp16 out"
            ) from error
    return _finish(converted, source, target)


def _batches(source: str | os.PathLike[str], images: Iterable[Tensor]) -> Iterator[dict[str, NDArray[Any]]]:
    entry = open_session(source).get_inputs()[0]
    size = entry.shape[0] if isinstance(entry.shape[0], int) else None
    waiting: NDArray[Any] | None = None
    for batch in images:
        array = np.ascontiguousarray(batch.detach().cpu().numpy(), dtype=np.float32)
        waiting = array if waiting is None else np.concatenate([waiting, array])
        step = size or len(waiting)
        while 0 < step <= len(waiting):
            yield {entry.name: waiting[:step]}
            waiting = waiting[step:]


class _Reader:
    """Hands the calibration inputs to the quantizer."""

    def __init__(self, batches: list[dict[str, NDArray[Any]]]) -> None:
        self._rest = iter(batches)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._rest, None)

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        return self._rest

    def __next__(self) -> dict[str, NDArray[Any]]:
        return next(self._rest)


def _finish(proto: onnx.ModelProto, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    metadata = {p.key: p.value for p in onnx.load(source, load_external_data=False).metadata_props}
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto)
    with atomic_path(Path(target)) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return Path(target)
