"""The format of an artifact, and reading its two files. No pickle.

An artifact is a folder of two files. `model.safetensors` holds every tensor by its state-dict name, and buffers that
a state dict leaves out where they are not those of a freshly built model. `structure.json` holds what is needed to
build the module that the tensors fit, under these keys and no others:

    format       "sparsekit/1"
    source       {"timm": name, "args": {...}} or {"factory": "package.module.Class"} (a note for the reader)
    attributes   per module, the plain attributes that differ from a freshly built dense model (sizes, groups)
    tensors      name -> [dtype, shape]
    bypassed     names of residual blocks that are gone: they pass their input on
    zeros        by name, the width of layer norms that count channels that the cut took as zeros
    plain        names of weight-standardised convolutions that the cut turned into plain ones
    rewrites     places in the code of modules that get another size: module, method, call, argument, hash of the
                 source, and the size, -1 for one that is left to torch
    sha256       of model.safetensors
    plan         what was cut, as PrunePlan.to_json gives it, or null
    info         whatever the caller adds: class names, input size, mean, std, accuracy, recipe
    versions     of sparsekit, torch and timm

Loading builds the dense model again, bypasses blocks, makes convolutions plain, lets layer norms count zeros, gives
every tensor its shape, puts sizes into the code, sets attributes and fills in the numbers. It does not need the plan,
so a model that was cut twice loads like any other. Before anything is built, the header of model.safetensors must agree
with `tensors`, name by name: nothing is allocated that the file does not hold.

An artifact is data. It names a model of the installed timm, or what the caller's factory builds, never a file, an
address or an import. It can set plain attributes that are there already, and sizes in reshapes of installed code whose
hash is the recorded one. `sha256` shows damage and mixed-up files, not origin: whoever replaces the weights can replace
it too. A SHA-256 of structure.json, kept elsewhere, covers the whole artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)
from torch import Tensor, nn

from sparsekit.errors import FileError, InputError, first_names
from sparsekit.files import is_pickle, sha256_of
from sparsekit.machine import library_versions
from sparsekit.structure.places import Place
from sparsekit.structure.plan import PrunePlan

FORMAT = "sparsekit/1"
# The dtypes an artifact can hold, and what safetensors calls them.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class _Closed(BaseModel):
    """No keys but its own, and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TimmSource(_Closed):
    """A model that `timm.create_model` builds."""

    timm: str
    args: dict[str, JsonValue]


class OwnSource(_Closed):
    """A model that the caller's factory builds; its class is noted."""

    factory: str


def _read_plan(value: Any) -> PrunePlan | None:
    if value is None:
        return None
    try:
        return PrunePlan.from_json(value)
    except FileError as error:
        raise ValueError(str(error)) from None


def _write_plan(plan: PrunePlan | None) -> dict[str, Any] | None:
    return None if plan is None else plan.to_json()


class Structure(_Closed):
    """structure.json, as the module's docstring describes it."""

    format: str
    source: TimmSource | OwnSource
    attributes: dict[str, dict[str, JsonValue]]
    tensors: dict[str, tuple[str, list[Annotated[int, Field(ge=0, lt=2**63)]]]]
    bypassed: list[str]
    plain: list[str]
    zeros: dict[str, Annotated[int, Field(ge=1, lt=2**31)]]
    rewrites: list[Place]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    plan: Annotated[PrunePlan | None, PlainValidator(_read_plan), PlainSerializer(_write_plan)]
    info: dict[str, JsonValue]
    versions: dict[str, str]


def read_structure(path: str | Path) -> dict[str, Any]:
    """The checked content of an artifact's structure.json, as plain data. Raises FileError if `path` is no artifact."""
    structure: dict[str, Any] = json.loads(parse_structure(Path(path)).model_dump_json())
    return structure


def parse_structure(folder: Path) -> Structure:
    """The checked content of an artifact's structure.json. Raises FileError if it is missing or damaged."""
    file = _file_of(folder, "structure.json", f"{folder} is no sparsekit artifact: it has no structure.json")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{file} cannot be read: {error}; copy the artifact again") from error
    if not isinstance(content, dict):
        raise FileError(f"{file} is no artifact's structure: expected a JSON object, got {content!r:.40}")
    if content.get("format") != FORMAT:
        lacks = "" if "format" in content else " and lacks ['format']"
        raise FileError(
            f"{file} has format {content.get('format')!r:.40}{lacks}; "
            f"sparsekit {library_versions()['sparsekit']} reads {FORMAT!r}; "
            f"install the sparsekit that wrote it{_written_by(content)}"
        )
    missing = [key for key in Structure.model_fields if key not in content]
    if missing:
        raise FileError(f"{file} lacks {missing}; it is damaged, copy the artifact again")
    try:
        return Structure.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise FileError(
            f"{file} is damaged or written by hand: {describe_mistake(error)}; copy or save the artifact again"
        ) from None


def read_tensors(folder: Path, structure: Structure) -> dict[str, Tensor]:
    """The tensors of an artifact. Raises FileError unless the file is what structure.json says it is."""
    file = _file_of(
        folder,
        "model.safetensors",
        f"{folder} has no model.safetensors; the artifact is incomplete, copy the whole folder",
    )
    try:
        if is_pickle(file):
            raise FileError(
                f"{file} is a pickle under another name; sparsekit unpickles nothing, because that can run any code. "
                "Write the artifact with sparsekit.save"
            )
        if sha256_of(file) != structure.sha256:
            raise FileError(
                f"{file} does not have the hash that structure.json records: it is damaged, or belongs to another "
                "artifact; copy the whole folder again"
            )
        _check_header(file, structure)
        tensors: dict[str, Tensor] = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{file} cannot be read: {error}; copy the artifact again") from error
    return tensors


def portable_attributes(module: nn.Module) -> dict[str, Any]:
    """The module's own attributes that an artifact may carry: those that are public and plain data."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and _is_plain_data(value)
    }


def dtype_name(tensor: Tensor) -> str:
    """The dtype as an artifact records it, such as float32."""
    return str(tensor.dtype).removeprefix("torch.")


def to_json_text(structure: Mapping[str, Any]) -> str:
    """The structure as JSON. Raises InputError if it holds what JSON cannot."""
    try:
        return json.dumps(structure, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the artifact cannot be described in JSON: {error}; give `info` and `model_args` as finite numbers, "
            "strings, lists and dictionaries"
        ) from error


def describe_mistake(error: ValidationError) -> str:
    """The deepest mistake in words. Where a key may hold one of two things, that is the one in the likelier of them."""
    mistake = max(error.errors(), key=lambda one: len(one["loc"]))
    place = ".".join(str(part) for part in mistake["loc"] if not str(part).startswith("_"))
    return f"{place}: {mistake['msg']}, got {mistake['input']!r:.60}"


def installed_versions() -> dict[str, str]:
    """The versions that an artifact records."""
    return {name: library_versions()[name] for name in ("sparsekit", "torch", "timm")}


def version_note(structure: Structure) -> str:
    """The recorded versions that differ from the installed ones, as the end of a message."""
    found = [
        f"{name} {structure.versions.get(name, 'unknown')} (installed: {installed})"
        for name, installed in installed_versions().items()
        if structure.versions.get(name) != installed
    ]
    return f"; it was written with {', '.join(found)}" if found else ""


def _file_of(folder: Path, name: str, missing: str) -> Path:
    """The artifact's file of this name. Raises FileError if it is missing, or a link to something elsewhere."""
    file = folder / name
    try:
        if not file.is_file():
            raise FileError(missing)
        target = file.resolve()
        outside = target.parent != folder.resolve()
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error}") from error
    if outside:
        raise FileError(f"{file} is a link to {target}, outside of the artifact; put the file itself there")
    return file


def _written_by(content: Mapping[str, Any]) -> str:
    versions = content.get("versions")
    written_by = versions.get("sparsekit") if isinstance(versions, dict) else None
    return f", {written_by!r:.40}" if written_by else ""


def _check_header(file: Path, structure: Structure) -> None:
    """Raise FileError unless the file's header lists the recorded tensors and no others."""
    with safetensors.safe_open(file, "pt") as opened:
        names = opened.keys()
        slices = {name: opened.get_slice(name) for name in names}
        held = {name: (one.get_dtype(), list(one.get_shape())) for name, one in slices.items()}
    recorded = structure.tensors
    if missing := sorted(recorded.keys() - held.keys()):
        raise FileError(
            f"{file} lacks {first_names(missing)}, which structure.json records; copy both files again"
        )
    if extra := sorted(held.keys() - recorded.keys()):
        raise FileError(
            f"{file} holds {first_names(extra)}, which structure.json does not record; copy both files again"
        )
    for name, (dtype, shape) in recorded.items():
        if dtype not in DTYPES:
            raise FileError(f"{name} of {file.parent} has the unknown dtype {dtype!r:.40}")
        if held[name] != (DTYPES[dtype], shape):
            raise FileError(
                f"{name} is recorded in structure.json as {dtype} of shape {shape}, but {file} holds "
                f"{held[name][0]} of shape {held[name][1]}; copy both files again"
            )


def _is_plain_data(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain_data(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain_data(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
