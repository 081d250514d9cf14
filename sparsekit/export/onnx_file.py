"""Export a model to one self-contained ONNX file with metadata, and read the metadata back."""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparsekit.errors import FileError, InputError, ModelError, RunError
from sparsekit.evaluation import Arguments, ExampleInput, as_inputs, copied
from sparsekit.export.group_merging import merge_groups_
from sparsekit.export.quiet import quiet
from sparsekit.files import atomic_path
from sparsekit.machine import conv_step

__all__ = ["export_onnx", "read_metadata"]

# Protocol buffers, and so ONNX files without side files, end at 2 GiB.
_MAX_BYTES = 2**31 - 1
# What torch.export says of a size that depends on data, as the number of boxes of a detector does.
_DATA_DEPENDENT = re.compile("data-dependent|unbacked")
# These loggers report what the exporter tries next; the outcome reaches the caller as a file or an exception.
_NOISY_LOGGERS = (
    "torch.onnx",
    "torch.onnx._internal.exporter._compat",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "onnxscript",
    "onnxscript.version_converter",
)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: ExampleInput,
    *,
    opset: int | None = None,
    dynamic_batch: bool = False,
    merge_groups: bool = True,
    metadata: Mapping[str, str] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] = ("logits",),
) -> Path:
    """Export `model` in eval mode and float32 to the ONNX file `path` and return the path.

    Shapes are those of `example_input`, as `find_groups` takes it. With `dynamic_batch` the batch is open: the first
    dimension of every tensor that has the first one's batch size. The file's inputs are the tensors of the example, in
    order; unless `input_names` says otherwise, a single one is called "input", several "input0", "input1" and so on.
    `output_names` are those of the tensors that the model returns, in order; those without one get the exporter's.
    The opset is the exporter's own unless `opset` is given. `metadata` is stored in the file (`read_metadata`).

    A BatchNorm after a convolution is folded into it, subnormal weights become 0, and weights lie in the file itself.
    With `merge_groups` narrow groups of a convolution are merged, filled up with zeros, to the width that ONNX Runtime
    runs fast on this processor. The file computes the same, though these layers multiply up to four times as much; for
    another processor or runtime it may be faster without.

    A copy on the CPU is exported: the caller's model keeps its mode, device and precision, and the random state does
    not move. The file appears complete or not at all.

    Raises:
        ModelError: the model cannot be traced, is too large for one file, or has no export in this opset.
        RunError: the exporter wrote an invalid graph.
    """
    inputs = _portable_inputs(as_inputs(example_input), dynamic_batch)
    n = len(inputs.tensors)
    if input_names is None:
        input_names = ["input"] if n == 1 else [f"input{i}" for i in range(n)]
    if len(input_names) != n:
        raise InputError(f"input_names must name the {n} example inputs, got {list(input_names)}")
    portable = _portable_copy(model)
    open_dims = _batch_dims(portable, inputs) if dynamic_batch else None
    proto = _trace(portable, inputs, opset, open_dims, input_names, output_names)
    _check_opset(proto, opset)
    _strip_trace_notes(proto)
    _flush_subnormals(proto)
    if merge_groups:
        merge_groups_(proto, conv_step())
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise RunError(
            f"the exporter produced an invalid ONNX graph for {type(model).__name__}: {error}"
        ) from error
    target = Path(path)
    with atomic_path(target) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return target


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata stored in the ONNX file `path`; FileError if it is missing or no ONNX file."""
    file = Path(path)
    if not file.is_file():
        raise FileError(f"ONNX file {file} does not exist; give the path of a .onnx file")
    try:
        proto = onnx.load(file, load_external_data=False)
    # The decoder's exception class depends on which protobuf implementation is installed.
    except Exception as error:
        raise FileError(f"{file} is not an ONNX file or is damaged ({error}); export it again") from error
    if not proto.graph.node:
        raise FileError(f"{file} holds no ONNX graph; export it again")
    return {entry.key: entry.value for entry in proto.metadata_props}


def metadata_texts(description: Mapping[str, Any]) -> dict[str, str]:
    """Plain data as texts: an ONNX file's metadata holds nothing else."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}


def _portable_inputs(inputs: Arguments, dynamic_batch: bool) -> Arguments:
    inputs = inputs.each(lambda tensor: _float32_cpu(tensor.detach()))
    if not dynamic_batch or _batch_size(inputs) != 1:
        return inputs
    # Tracing takes a dimension of size 1 for a constant, because it broadcasts: show two.
    return inputs.each(lambda x: torch.cat([x, x]) if x.dim() > 0 and x.shape[0] == 1 else x)


def _float32_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32) if tensor.is_floating_point() else tensor.to("cpu")


def _batch_size(inputs: Arguments) -> int | None:
    return next((tensor.shape[0] for tensor in inputs.tensors if tensor.dim() > 0), None)


def _portable_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, float32, on the CPU, for which ONNX Runtime has all its kernels."""
    size_bytes = 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if size_bytes > _MAX_BYTES:
        raise ModelError(
            f"{type(model).__name__} has {size_bytes / 2**30:.1f} GiB of weights in float32; one ONNX file "
            "holds 2 GiB; use a smaller model"
        )
    duplicate = copied(model)
    # Through train() first: it drops tensors that some models compute from their weights in eval mode and keep.
    return duplicate.to("cpu").float().train().eval().requires_grad_(False)


def _batch_dims(model: nn.Module, inputs: Arguments) -> dict[str, Any] | tuple[Any, ...]:
    """Which dimensions of which tensors are open, nested as the arguments are; by name where some are given by name."""
    batch, size = torch.export.Dim("batch", min=1), _batch_size(inputs)

    def opened(nest: Any) -> Any:
        if isinstance(nest, Tensor):
            return {0: batch} if nest.dim() > 0 and nest.shape[0] == size else None
        if isinstance(nest, Mapping):
            return {key: opened(value) for key, value in nest.items()}
        return [opened(value) for value in nest] if isinstance(nest, (list, tuple)) else None

    positional = tuple(opened(one) for one in inputs.positional)
    if not inputs.keyword:
        return positional
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, positional, strict=False)), **opened(inputs.keyword)}


def _trace(
    model: nn.Module,
    inputs: Arguments,
    opset: int | None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | None,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> onnx.ModelProto:
    # By torch.export, not the deprecated TorchScript tracer: where control flow depends on data it fails, and does not
    # bake in one branch. In ONNX Runtime both graphs run equally fast (resnet18, mobilenetv3_small_050, test_convnext,
    # test_vit: within 2 %, as far as a file is from itself).
    ends_in_dict = bool(inputs.positional) and isinstance(inputs.positional[-1], dict)

    def attempt() -> onnx.ModelProto:
        with quiet(_NOISY_LOGGERS), torch.random.fork_rng(devices=[]), torch.no_grad():
            program = torch.onnx.export(
                model,
                # A dictionary at the end would be taken for keyword arguments.
                (*inputs.positional, {}) if ends_in_dict else inputs.positional,
                kwargs=dict(inputs.keyword) or None,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                input_names=list(input_names),
                output_names=list(output_names),
                external_data=False,
                verbose=False,
            )
        assert program is not None  # it is None only for the TorchScript exporter
        proto: onnx.ModelProto = program.model_proto
        return proto

    try:
        try:
            return attempt()
        except Exception:
            # The exporter knows fused attention only for queries of three or four dimensions.
            if not _write_attention_out_(model):
                raise
            return attempt()
    # The exporter's errors have no common base, and the model's own code may raise anything.
    except Exception as error:
        if _DATA_DEPENDENT.search(f"{error} {error.__cause__}") and not dynamic_shapes:
            with suppress(Exception):
                return _traced_by_example(model, inputs, opset, input_names, output_names)
        cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{type(model).__name__} cannot be exported to ONNX: {cause[0]}; its forward must be traceable "
            "by torch.export" + (" with an open batch size" if dynamic_shapes else "")
        ) from error


def _traced_by_example(
    model: nn.Module,
    inputs: Arguments,
    opset: int | None,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> onnx.ModelProto:
    """By torch's older exporter, which follows one example; how many boxes a detector finds stays open in it."""
    with (
        TemporaryDirectory() as folder,
        quiet(_NOISY_LOGGERS),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
    ):
        file = Path(folder) / "traced.onnx"
        torch.onnx.export(
            model,
            inputs.positional,
            file,
            kwargs=dict(inputs.keyword) or None,
            dynamo=False,
            opset_version=opset,
            input_names=list(input_names),
            output_names=list(output_names) or None,
        )
        proto = onnx.load(file)
    warnings.warn(
        f"{type(model).__name__} has sizes that depend on its data, which torch.export refuses; the file was traced on "
        "the example by torch's older exporter: where the model's code decides by data, the file always does as it did "
        "there",
        stacklevel=4,
    )
    return proto


def _write_attention_out_(model: nn.Module) -> bool:
    """Switch timm's attention from the fused operator to matrix products, in place; returns whether there was any."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    return bool(fused)


def _check_opset(proto: onnx.ModelProto, opset: int | None) -> None:
    # If it cannot convert to the opset asked for, the exporter only logs that and keeps its own.
    written = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and written != opset:
        raise ModelError(
            f"this model cannot be exported in opset {opset}, only in {written}; ask for {written} or none"
        )


def _strip_trace_notes(proto: onnx.ModelProto) -> None:
    """Remove the exporter's notes on nodes and values: they hold source paths of this machine."""
    graph = proto.graph
    for part in (
        proto,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        del part.metadata_props[:]
        part.doc_string = ""


def _flush_subnormals(proto: onnx.ModelProto) -> None:
    """Set weights below the smallest normal float32 to 0: some processors take a slow path for them."""
    tiny = np.finfo(np.float32).tiny
    for initializer in proto.graph.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(initializer)
        subnormal = (values != 0) & (np.abs(values) < tiny)
        if subnormal.any():
            flushed = np.where(subnormal, np.float32(0), values)
            initializer.CopyFrom(numpy_helper.from_array(flushed, initializer.name))
