"""Save a model as an artifact: record how it differs from the dense model, and rehearse loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from sparsekit.artifact.dense_model import Factory, build_by_factory, build_timm, describe_source
from sparsekit.artifact.format import (
    DTYPES,
    FORMAT,
    Structure,
    describe_mistake,
    dtype_name,
    installed_versions,
    portable_attributes,
    to_json_text,
)
from sparsekit.artifact.load import bypass_recorded_, count_recorded_zeros_, fill_model_
from sparsekit.errors import FileError, InputError, first_line
from sparsekit.files import atomic_path, sha256_of
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.attention import closed_class, is_open
from sparsekit.surgery.bypass import bypassed
from sparsekit.surgery.layer_norms import zeros_counted
from sparsekit.surgery.norms import is_standardised, make_plain_
from sparsekit.surgery.rewrite_code import original_class, rewritten_places


def save(
    model: nn.Module,
    path: str | Path,
    *,
    model_name: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    factory: Factory | None = None,
    plan: PrunePlan | None = None,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` to the folder `path`, created, or replaced as a whole; returns the folder.

    A timm model needs nothing more if its name and class count say how to build it. With other arguments (image size,
    custom depths) give `model_name` and `model_args` as for `timm.create_model`. Any other module needs `factory`, a
    function without arguments that builds the dense model; give `load` the same one.

    The dense model is built once and filled as `load` would do it. Raises InputError if that fails, if its modules are
    of other kinds than the model's, or if `info` is not plain JSON, and FileError if `path` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileError(f"cannot save an artifact to {path}: it is a file; name a folder")
    source = describe_source(model, model_name, model_args, factory)
    fresh = build_by_factory(factory) if factory else build_timm(source["timm"], source["args"])
    gone = bypassed(model)
    bypass_recorded_(fresh, gone)
    plain = _made_plain(fresh, model)
    make_plain_(fresh, plain)
    zeros = zeros_counted(model)
    count_recorded_zeros_(fresh, zeros)
    _check_same_modules(fresh, model)
    tensors = _tensors_to_keep(fresh, model)
    structure = {
        "format": FORMAT,
        "source": source,
        "attributes": _changed_attributes(fresh, model),
        "tensors": {name: [dtype_name(tensor), list(tensor.shape)] for name, tensor in tensors.items()},
        "bypassed": gone,
        "plain": plain,
        "zeros": zeros,
        "rewrites": _rewrites(model),
        "sha256": "0" * 64,
        "plan": plan.to_json() if plan else None,
        "info": dict(info or {}),
        "versions": installed_versions(),
    }
    _rehearse_loading(fresh, to_json_text(structure), tensors)  # before anything is written over
    # Both are written before the first takes its name, so that an interruption leaves the artifact that was there.
    with (
        atomic_path(path / "structure.json") as described,
        atomic_path(path / "model.safetensors") as stored,
    ):
        safetensors.torch.save_file(tensors, stored, metadata={"format": "pt"})
        structure["sha256"] = sha256_of(stored)
        described.write_text(to_json_text(structure) + "\n", encoding="utf-8")
    return path


def _made_plain(fresh: nn.Module, model: nn.Module) -> list[str]:
    """Names of convolutions that are standardised in the fresh model and plain in the cut one."""
    held = dict(model.named_modules())
    return [
        name
        for name, module in fresh.named_modules()
        if is_standardised(module) and name in held and not is_standardised(held[name])
    ]


def _check_same_modules(fresh: nn.Module, model: nn.Module) -> None:
    """Raise InputError if the rebuilt model has other kinds of modules: it would compute something else."""
    built = {name: _kind(module) for name, module in fresh.named_modules()}
    held = {name: _kind(module) for name, module in model.named_modules()}
    for name in [*held, *built]:
        if built.get(name) is not held.get(name):
            mine, theirs = (one[name].__name__ if name in one else "nothing" for one in (held, built))
            raise InputError(
                f"the model that would be rebuilt differs: {name or 'the model'} is {mine}, rebuilt {theirs}; pass "
                "save(..., model_name=, model_args=) with the arguments it was created with, or factory="
            )


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class whose code the module runs; a parametrisation, a rewrite and open attention give it one of its own."""
    if is_open(module):
        return closed_class(module)
    return type_before_parametrizations(module) if is_parametrized(module) else original_class(module)


def _tensors_to_keep(fresh: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the state dict, and other buffers that differ from a fresh model's.

    They are ready for safetensors: on the CPU, contiguous, no two in the same memory.
    """
    state = dict(model.state_dict())
    built = dict(fresh.named_buffers(remove_duplicate=False))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in state and name in built and not _equal(buffer, built[name]):
            state[name] = buffer
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise InputError(f"{name} of {type(model).__name__} holds no numbers that could be saved")
        if dtype_name(tensor) not in DTYPES or tensor.layout != torch.strided:
            raise InputError(f"{name} cannot be saved: it is a {tensor.layout} tensor of {tensor.dtype}")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())


def _changed_attributes(fresh: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """By module, the attributes in which the model differs from the fresh one."""
    built = {name: portable_attributes(module) for name, module in fresh.named_modules()}
    changed: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        for key, value in portable_attributes(module).items():
            if key in built[name] and built[name][key] != value:
                changed.setdefault(name, {})[key] = value
    return changed


def _rewrites(model: nn.Module) -> list[dict[str, Any]]:
    """The rewritten places, under the names that their modules have now."""
    return [
        asdict(replace(place, module=name))
        for name, module in model.named_modules()
        for place in rewritten_places(module)
    ]


def _rehearse_loading(fresh: nn.Module, text: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill the fresh model from what will be written. Raises InputError if that fails."""
    try:
        fill_model_(fresh, Structure.model_validate_json(text, strict=True), tensors)
    except ValidationError as error:
        raise InputError(f"the artifact could not be loaded again: {describe_mistake(error)}") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the artifact could not be loaded again: {first_line(error)}") from error
