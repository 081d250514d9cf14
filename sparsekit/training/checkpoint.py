"""Save and load training state as one safetensors file: tensors as tensors, all else as JSON in the header.

There is no pickle: reading a file from somebody else cannot run code.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsekit.errors import FileError
from sparsekit.files import atomic_path

_STRUCTURE = "sparsekit_state"


def save_state(path: Path, state: Any) -> None:
    """Write `state` atomically: any nesting of dict (str or int keys), list, tuple, tensor, scalar, None.

    NaN, infinities, int keys and tuples come back as they were. Tensors that share memory are written separately.
    Raises TypeError for anything else, before the old file is touched.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_encode(state, tensors, "state"), allow_nan=False)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_STRUCTURE: structure})


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote, tensors on the CPU. Raises FileError if it is missing or damaged."""
    if not path.is_file():
        raise FileError(f"state file {path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _STRUCTURE not in metadata:
                raise FileError(f"{path} is a safetensors file, but not a training state of sparsekit.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        return _decode(json.loads(metadata[_STRUCTURE]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise FileError(
            f"state file {path} is damaged ({error}); delete it to start this phase again."
        ) from error


def _encode(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """The JSON form of `value`: scalars as they are, all else as a list [tag, content]."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else ["float", str(value)]
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return ["tensor", key]
    if isinstance(value, (list, tuple)):
        tag = "list" if isinstance(value, list) else "tuple"
        return [tag, [_encode(item, tensors, f"{where}[{index}]") for index, item in enumerate(value)]]
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise TypeError(f"{where} has the key {key!r}; keys must be str or int")
        return ["dict", [[key, _encode(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]]
    raise TypeError(f"{where} is a {type(value).__name__}; it cannot be stored without pickle")


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(node, list):
        return node
    tag, content = node
    if tag == "float":
        return float(content)
    if tag == "tensor":
        return tensors[content]
    if tag == "list":
        return [_decode(item, tensors) for item in content]
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if tag == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown tag {tag!r}")
