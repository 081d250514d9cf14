"""Load a model from an artifact: build it dense, then give it the recorded shapes, sizes and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.artifact.dense_model import Factory, build_dense_model, name_source
from sparsekit.artifact.format import (
    Structure,
    parse_structure,
    portable_attributes,
    read_tensors,
    version_note,
)
from sparsekit.errors import FileError, InputError, ModelError, VerificationError, first_line, first_names
from sparsekit.evaluation import comparing, flat_tensors
from sparsekit.surgery.attention import open_where_cut_
from sparsekit.surgery.bypass import bypass_
from sparsekit.surgery.layer_norms import count_zeros_
from sparsekit.surgery.norms import is_standardised, make_plain_
from sparsekit.surgery.rewrite_code import leave_sizes_to_torch_


def load(path: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """The model an artifact holds, on the CPU, in eval mode, with equal logits. Nothing is unpickled.

    `factory` builds the dense model; it is needed if that is not timm's. What it returns is copied, never changed. The
    caller's random state does not move. Raises FileError if the folder is no artifact, is damaged, has another format,
    or does not fit the dense model.
    """
    path = Path(path)
    structure = parse_structure(path)
    tensors = read_tensors(path, structure)
    written_with = version_note(structure)
    try:
        model = build_dense_model(path, structure, factory)
    except ModelError as error:
        raise FileError(f"the dense model of {path} cannot be built: {error}{written_with}") from error
    try:
        bypass_recorded_(model, structure.bypassed)
        _make_plain_(model, structure.plain)
        count_recorded_zeros_(model, structure.zeros)
        fill_model_(model, structure, tensors)
    except Exception as error:  # a wrong artifact may fail in any way
        raise FileError(
            f"{path} does not fit the dense model, {name_source(structure.source)}: {first_line(error)}{written_with}"
        ) from error
    return model.eval()


def check_round_trip(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor,
    *,
    factory: Factory | None = None,
    tolerance: float = 1e-5,
) -> float:
    """Load the artifact, compare its logits with the model's on `inputs`, and return the largest absolute difference.

    Raises VerificationError if that exceeds `tolerance` times the largest logit.
    """
    loaded = load(path, factory=factory).to(inputs.device)
    with comparing(model):
        expected, found = flat_tensors(model(inputs)), flat_tensors(loaded(inputs))
    difference = max(float((one - other).abs().max()) for one, other in zip(expected, found, strict=True))
    if not difference <= tolerance * max(float(one.abs().max()) for one in expected):
        raise VerificationError(
            f"the artifact {path} gives other logits than the model: off by {difference:.3g}"
        )
    return difference


def bypass_recorded_(model: nn.Module, names: list[str]) -> None:
    """Bypass the named modules, in place. Raises InputError for a name that the dense model does not have."""
    try:
        bypass_(model, names)
    except ModelError as error:
        raise InputError(str(error)) from None


def count_recorded_zeros_(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Let the named layer norms count zeros up to their dense width, in place. Raises InputError for other modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, width in widths.items():
        if name not in modules:
            raise InputError(f"the dense model has no module {name!r:.80}")
        count_zeros_(modules[name], width)


def fill_model_(model: nn.Module, structure: Structure, tensors: Mapping[str, Tensor]) -> None:
    """Give a fresh dense model the recorded shapes, sizes, attributes and numbers, in place.

    Blocks are bypassed and convolutions plain already. Raises InputError if the two do not fit.
    """
    stored = model.state_dict().keys()
    if missing := sorted(stored - tensors.keys()):
        raise InputError(f"tensors of the dense model are not in the artifact: {first_names(missing)}")
    modules = dict(model.named_modules(remove_duplicate=False))
    holders = {name: _holder(modules, name) for name in tensors}
    for name, tensor in tensors.items():
        _make_room_(holders[name], name.rpartition(".")[2], tensor)
    open_where_cut_(model)
    places = structure.rewrites
    for place in places:
        if place.call < 0 or place.argument < 0 or place.size == 0 or place.size < -1:
            raise InputError(f"a rewrite of {place.module}.{place.method} has an impossible number")
    leave_sizes_to_torch_(model, places)
    _set_attributes_(model, structure.attributes)
    known = model.state_dict()
    left_out = tensors.keys() - known.keys()
    # In place in the state dict, which holds the versions of the modules' formats: some refuse one without.
    known.update({name: tensor for name, tensor in tensors.items() if name not in left_out})
    model.load_state_dict(known, strict=True)
    for name in left_out:
        holders[name][name.rpartition(".")[2]] = tensors[name].clone()


def _make_plain_(model: nn.Module, names: list[str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules or not is_standardised(modules[name]):
            raise InputError(f"{name!r:.80} is no weight-standardised convolution of the dense model")
    make_plain_(model, names)


def _holder(modules: Mapping[str, nn.Module], name: str) -> dict[str, Any]:
    """The dictionary, of parameters or buffers of a module, that has a place for the tensor."""
    owner_name, _, key = name.rpartition(".")
    owner = modules.get(owner_name)
    holders: Iterable[dict[str, Any]] = (owner._parameters, owner._buffers) if owner is not None else ()
    for held in holders:
        # The one tensor that a cut adds is a bias, for a folded constant.
        if held.get(key) is not None or (key == "bias" and key in held):
            return held
    raise InputError(f"the dense model has no {name}")


def _make_room_(held: dict[str, Any], key: str, tensor: Tensor) -> None:
    """Give a parameter or buffer the shape and dtype of `tensor`."""
    old = held[key]
    if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
        return
    empty = torch.empty_like(tensor, device="cpu")
    if isinstance(old, nn.Parameter):
        old.data = empty  # in place: tied parameters stay tied
    else:
        held[key] = nn.Parameter(empty) if old is None else empty


def _set_attributes_(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, values in attributes.items():
        if name not in modules:
            raise InputError(f"the dense model has no module {name!r:.80}")
        settable = portable_attributes(modules[name])
        for key, value in values.items():
            place = f"{name}.{key}" if name else key
            if key not in settable:
                raise InputError(
                    f"{place} is no plain attribute of the dense model; an artifact sets no others"
                )
            modules[name].__dict__[key] = _of_kind(value, settable[key], place)


def _of_kind(value: Any, built: Any, place: str) -> Any:
    """`value`, with tuples where JSON only has lists. Raises InputError if it is of another kind than `built`."""
    if built is None:
        return value
    if isinstance(built, (tuple, list)) and isinstance(value, list):
        alike = [*built, *built[-1:] * len(value)]  # a longer list goes on as the built one ends
        items = [_of_kind(v, b, place) for v, b in zip(value, alike, strict=False)]
        return tuple(items) if isinstance(built, tuple) else items
    if isinstance(built, dict) and isinstance(value, dict):
        return {key: _entry_of_kind(item, built.get(key), f"{place}.{key}") for key, item in value.items()}
    if isinstance(built, float) and type(value) is int:
        return float(value)
    for kind in (bool, int, float, str):
        if isinstance(built, kind) and type(value) is kind:
            return value
    raise InputError(f"{place} must be a {type(built).__name__} as in the dense model, got {value!r:.60}")


def _entry_of_kind(value: Any, built: Any, place: str) -> Any:
    """As `_of_kind`, for an entry of a dictionary: a text or a list there may also be None."""
    return None if value is None and isinstance(built, (str, list, tuple)) else _of_kind(value, built, place)
