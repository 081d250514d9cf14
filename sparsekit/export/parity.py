"""Run ONNX files on data: how far they are from the torch model, and how accurate they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from sparsekit.errors import DataError, FileError, VerificationError
from sparsekit.evaluation import comparing, flat_tensors
from sparsekit.export.session import open_session

__all__ = ["Parity", "check_parity", "onnx_accuracy", "onnx_logits"]

_TORCH_BATCH = 64
_NUMPY_TYPE = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclass(frozen=True)
class Parity:
    """How far the outputs of ONNX Runtime are from those of torch on the same inputs.

    max_abs: max |torch - onnx| over all outputs.
    max_rel: max_abs / max |torch|, that is, relative to the largest output and not element by element.
    top1_agreement: fraction of the inputs on which both name the same class, in [0, 1].
    """

    max_abs: float
    max_rel: float
    top1_agreement: float

    def to_json(self) -> dict[str, float]:
        """Return the three figures under their names."""
        return asdict(self)


def check_parity(
    model: nn.Module, onnx_path: str | os.PathLike[str], inputs: Tensor, *, threads: int = 1
) -> Parity:
    """Compare `model` (in eval mode, restored after) with the ONNX file on `inputs` of shape (n, ...).

    The file runs in the batch size it declares, the model on its own device and in its own precision: in half precision
    it differs by its rounding. Only the first output is compared.

    Raises:
        FileError: the file cannot be loaded or does not take such inputs.
        DataError: `inputs` is empty.
        VerificationError: an output is NaN or infinite, or the two outputs differ in shape.
    """
    if len(inputs) == 0:
        raise DataError("parity needs at least one input, got none")
    theirs = torch.cat(list(onnx_logits(onnx_path, [inputs], threads=threads)))
    ours = _torch_logits(model, inputs)
    if ours.shape != theirs.shape:
        raise VerificationError(
            f"{onnx_path} gives outputs of shape {tuple(theirs.shape)}, the model of {tuple(ours.shape)}; "
            "it is the file of another model"
        )
    for name, values in (("the torch model", ours), (str(onnx_path), theirs)):
        if not bool(torch.isfinite(values).all()):
            raise VerificationError(f"an output of {name} is NaN or infinite on the parity inputs")
    max_abs = float((ours - theirs).abs().max())
    largest = max(float(ours.abs().max()), float(np.finfo(np.float64).tiny))
    agreement = float((ours.argmax(1) == theirs.argmax(1)).double().mean())
    return Parity(max_abs, max_abs / largest, agreement)


def onnx_logits(
    path: str | os.PathLike[str], batches: Iterable[Tensor], *, threads: int = 1
) -> Iterator[Tensor]:
    """Yield, for each batch of shape (n, ...), the file's first output, float32 of shape (n, classes).

    A batch is fed in pieces of the batch size that the file declares. The last piece is filled up with copies of its
    last input, and their outputs are dropped. Raises FileError if the file cannot be loaded, has
    several inputs, or takes inputs of another shape.
    """
    session = open_session(path, threads=threads)
    declared = session.get_inputs()
    if len(declared) != 1:
        names = [entry.name for entry in declared]
        raise FileError(
            f"{path} has {len(names)} inputs ({', '.join(names)}); only files with one can be fed images"
        )
    for batch in batches:
        yield _run_batch(session, Path(path), batch)


def onnx_accuracy(
    path: str | os.PathLike[str], loader: Iterable[tuple[Tensor, Tensor]], *, threads: int = 1
) -> float:
    """Return the top-1 accuracy, a fraction in [0, 1], of the ONNX file over (images, labels) batches.

    `labels` holds class indices, shape (n,). Raises FileError as `onnx_logits`, and DataError if there is no
    image.
    """
    labels: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        for batch, target in loader:
            labels.append(target.to("cpu"))
            yield batch

    correct = total = 0
    for logits in onnx_logits(path, images(), threads=threads):
        target = labels.pop()
        correct += int((logits.argmax(1) == target).sum())
        total += len(target)
    if total == 0:
        raise DataError(f"accuracy of {path} needs at least one image, got none")
    return correct / total


def _run_batch(session: onnxruntime.InferenceSession, path: Path, batch: Tensor) -> Tensor:
    entry = session.get_inputs()[0]
    fixed = [size if isinstance(size, int) else None for size in entry.shape]
    fits = len(fixed) == batch.dim() and all(
        size is None or size == given for size, given in zip(fixed[1:], batch.shape[1:], strict=True)
    )
    if not fits:
        raise FileError(
            f"{path} takes inputs of shape {tuple(entry.shape)}, got {tuple(batch.shape)}; "
            "export it for this size"
        )
    array = batch.detach().to("cpu").numpy()
    if entry.type in _NUMPY_TYPE:
        array = array.astype(_NUMPY_TYPE[entry.type], copy=False)
    step = fixed[0] or max(1, len(array))
    name = session.get_outputs()[0].name
    pieces = []
    for start in range(0, len(array), step):
        piece = array[start : start + step]
        missing = step - len(piece) if fixed[0] else 0
        padded = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
        outputs = session.run([name], {entry.name: np.ascontiguousarray(padded)})[0]
        pieces.append(np.asarray(outputs)[: len(piece)])
    if not pieces:
        raise DataError(f"a batch for {path} holds no inputs")
    return torch.from_numpy(np.concatenate(pieces)).float()


def _torch_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    anchor = next(model.parameters(), None)
    outputs = []
    with comparing(model):
        for piece in torch.split(inputs, _TORCH_BATCH):
            fed = piece
            if anchor is not None:
                fed = piece.to(anchor.device, anchor.dtype if piece.is_floating_point() else None)
            outputs.append(flat_tensors(model(fed))[0].float().cpu())
    return torch.cat(outputs)
