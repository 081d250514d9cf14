"""`save` and `load`: a pruned model as safetensors and JSON, without pickle.

An artifact is a folder of two files. `model.safetensors` holds every tensor by its state-dict name, and buffers that
a state dict leaves out where they are not those of a freshly built model. `structure.json` holds what is needed to
build the module that the tensors fit, under these keys and no others:

    format       "sparsekit/1"
    source       {"timm": name, "args": {...}} or {"factory": "package.module.Class"} (a note for the reader)
    attributes   per module, the plain attributes that differ from a freshly built dense model (sizes, groups)
    tensors      name -> [dtype, shape]
    bypassed     names of residual blocks that are gone: they pass their input on
    plain        names of weight-standardised convolutions that the cut turned into plain ones
    rewrites     places in the code of modules where a size is another (module, method, call, argument, source hash,
                 and the size, -1 for one that is left to torch)
    sha256       of model.safetensors
    plan         what was cut, as PrunePlan.to_json gives it, or null
    info         whatever the caller adds: class names, input size, mean, std, accuracy, recipe
    versions     of sparsekit, torch and timm

Loading builds the dense model again, makes convolutions plain, gives every tensor the recorded shape, puts sizes into
the code, sets the attributes and fills in the numbers; the plan is not needed for it, so a model that was cut twice
loads like any other. Before the model is built, the header of model.safetensors has to agree with
`tensors`, name by name: nothing is allocated that the file does not hold.

An artifact is data: what it names is a model of the installed timm, or what the caller's factory builds, never a file,
an address or an import. It can put numbers into plain attributes that are there already, and sizes into reshapes of
installed code whose hash is the recorded one. The hash in `sha256` tells damage and files of two artifacts that were
mixed up; it is no proof of origin, for who replaces the weights can replace it too. As structure.json holds it, a
SHA-256 of structure.json, kept elsewhere, covers the whole artifact.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor, nn

from sparsekit.bypass import bypass_, bypassed
from sparsekit.errors import FileError, InputError, ModelError, VerificationError
from sparsekit.files import atomic_path, write_json
from sparsekit.modes import comparing, flat_tensors
from sparsekit.plan import PrunePlan
from sparsekit.rewriting import Place, leave_sizes_to_torch_, original_class, rewritten_places
from sparsekit.standardised import is_standardised, make_plain_

FORMAT = "sparsekit/1"
Factory = Callable[[], nn.Module]
# The dtypes an artifact can hold, and what safetensors calls them.
_DTYPES = {
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
# Arguments of `timm.create_model` that name weights, files or addresses: an artifact brings its own weights.
_NOT_ARCHITECTURE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_SHOWN = 4


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _TimmSource(_Closed):
    timm: str
    args: dict[str, JsonValue]


class _OwnSource(_Closed):
    factory: str


class _Structure(_Closed):
    """structure.json, as the module's docstring describes it."""

    format: str
    source: _TimmSource | _OwnSource
    attributes: dict[str, dict[str, JsonValue]]
    tensors: dict[str, tuple[str, list[Annotated[int, Field(ge=0, lt=2**63)]]]]
    bypassed: list[str]
    plain: list[str]
    rewrites: list[Place]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    plan: PrunePlan | None
    info: dict[str, JsonValue]
    versions: dict[str, str]


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
    """Write `model` to the folder `path` (created or replaced), atomically file by file; returns the folder.

    A timm model needs nothing more if its name and class count say how to build it; with other arguments
    (image size, custom depths) give `model_name` and `model_args` as for `timm.create_model`. Any other module
    needs `factory`, a function without arguments that builds the dense model; `load` is then given the same one.
    The dense model is built once and filled as `load` would, to check that the artifact can be loaded. Raises
    InputError if it cannot be, if its modules are of other kinds than the model's, or `info` is not plain JSON.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileError(f"cannot save an artifact to {path}: it is a file; name a folder")
    source = _source(model, model_name, model_args, factory)
    fresh = _build(factory) if factory else _build_timm(source["timm"], source["args"])
    gone = bypassed(model)
    _bypass_(fresh, gone)
    plain = _made_plain(fresh, model)
    make_plain_(fresh, plain)
    _check_same_modules(fresh, model)
    tensors = _tensors_to_keep(fresh, model)
    structure = {
        "format": FORMAT,
        "source": source,
        "attributes": _changed_attributes(fresh, model),
        "tensors": {name: [_dtype_name(tensor), list(tensor.shape)] for name, tensor in tensors.items()},
        "bypassed": gone,
        "plain": plain,
        "rewrites": _rewrites(model),
        "sha256": "0" * 64,
        "plan": plan.to_json() if plan else None,
        "info": dict(info or {}),
        "versions": _installed(),
    }
    _rehearse_loading(fresh, _json(structure), tensors)  # before anything is written over
    with atomic_path(path / "model.safetensors") as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
        structure["sha256"] = _sha256(temporary)
    write_json(path / "structure.json", structure, indent=None)  # a plan has thousands of indices
    return path


def load(path: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """The model an artifact holds, on the CPU, in eval mode, with equal logits. Nothing is unpickled.

    `factory` builds the dense model: needed if that is not timm's, and used instead of timm if it is given. What
    it returns is copied, never changed. The caller's random state does not move. Raises FileError if the folder
    is no artifact, is damaged, was written by a newer format, or does not fit the model.
    """
    path = Path(path)
    structure = _read(path)
    tensors = _read_tensors(path, structure)
    written_with = _version_note(structure)
    try:
        model = _dense_model(path, structure, factory)
    except ModelError as error:
        raise FileError(f"the dense model of {path} cannot be built: {error}{written_with}") from error
    try:
        _bypass_(model, structure.bypassed)
        _make_plain_(model, structure.plain)
        _fill_(model, structure, tensors)
    except Exception as error:  # whatever is wrong with it, an artifact must not look like a bug of ours
        raise FileError(
            f"{path} does not fit the dense model, {_named(structure.source)}: {_one_line(error)}{written_with}"
        ) from error
    return model.eval()


def read_structure(path: str | Path) -> dict[str, Any]:
    """The content of an artifact's structure.json, checked. Raises FileError if `path` is no artifact."""
    structure: dict[str, Any] = json.loads(_read(Path(path)).model_dump_json())
    return structure


def check_round_trip(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor,
    *,
    factory: Factory | None = None,
    tolerance: float = 1e-5,
) -> float:
    """Load the artifact and compare logits with the model it was saved from; the largest absolute difference.

    Raises VerificationError if it exceeds `tolerance` times the largest logit.
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


# ------------------------------------------------------------------------------------- the two files, read


def _read(folder: Path) -> _Structure:
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
            f"{file} has format {content.get('format')!r:.40}{lacks}; sparsekit {version('sparsekit')} reads "
            f"{FORMAT!r}; install the sparsekit that wrote it{_written_by(content)}"
        )
    missing = [key for key in _Structure.model_fields if key not in content]
    if missing:
        raise FileError(f"{file} lacks {missing}; it is damaged, copy the artifact again")
    try:
        return _Structure.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise FileError(
            f"{file} is damaged or written by hand: {_first_mistake(error)}; copy or save the artifact again"
        ) from None


def _written_by(content: Mapping[str, Any]) -> str:
    versions = content.get("versions")
    written_by = versions.get("sparsekit") if isinstance(versions, dict) else None
    return f", {written_by!r:.40}" if written_by else ""


def _first_mistake(error: ValidationError) -> str:
    """The deepest mistake: of a key that may hold one of two things, it is that of the likelier one."""
    mistake = max(error.errors(), key=lambda one: len(one["loc"]))
    place = ".".join(str(part) for part in mistake["loc"] if not str(part).startswith("_"))
    return f"{place}: {mistake['msg']}, got {mistake['input']!r:.60}"


def _read_tensors(folder: Path, structure: _Structure) -> dict[str, Tensor]:
    """The content of model.safetensors, once it is what structure.json says it is."""
    file = _file_of(
        folder,
        "model.safetensors",
        f"{folder} has no model.safetensors; the artifact is incomplete, copy the whole folder",
    )
    try:
        _refuse_pickle(file)
        if _sha256(file) != structure.sha256:
            raise FileError(
                f"{file} does not have the hash that structure.json records: it is damaged, or belongs to another "
                "artifact; copy the whole folder again"
            )
        _check_header(file, structure)
        tensors: dict[str, Tensor] = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{file} cannot be read: {error}; copy the artifact again") from error
    return tensors


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


def _refuse_pickle(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(9)
    # A safetensors file begins with the length of its header, which may look like a pickle, and then a brace.
    if start[8:9] != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise FileError(
            f"{file} is a pickle under another name; sparsekit unpickles nothing, because that can run any code. "
            "Write the artifact with sparsekit.save"
        )


def _check_header(file: Path, structure: _Structure) -> None:
    """Raise FileError unless the file holds the recorded tensors and no others; reads no numbers."""
    with safetensors.safe_open(file, "pt") as opened:
        names = opened.keys()
        slices = {name: opened.get_slice(name) for name in names}
        held = {name: (one.get_dtype(), list(one.get_shape())) for name, one in slices.items()}
    recorded = structure.tensors
    if missing := sorted(recorded.keys() - held.keys()):
        raise FileError(
            f"{file} lacks {_listed(missing)}, which structure.json records; copy both files again"
        )
    if extra := sorted(held.keys() - recorded.keys()):
        raise FileError(
            f"{file} holds {_listed(extra)}, which structure.json does not record; copy both files again"
        )
    for name, (dtype, shape) in recorded.items():
        if dtype not in _DTYPES:
            raise FileError(f"{name} of {file.parent} has the unknown dtype {dtype!r:.40}")
        if held[name] != (_DTYPES[dtype], shape):
            raise FileError(
                f"{name} is recorded in structure.json as {dtype} of shape {shape}, but {file} holds "
                f"{held[name][0]} of shape {held[name][1]}; copy both files again"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _installed() -> dict[str, str]:
    return {name: version(name) for name in ("sparsekit", "torch", "timm")}


def _version_note(structure: _Structure) -> str:
    """Which recorded versions are not the installed ones, as the end of a message."""
    found = [
        f"{name} {structure.versions.get(name, 'unknown')} (installed: {installed})"
        for name, installed in _installed().items()
        if structure.versions.get(name) != installed
    ]
    return f"; it was written with {', '.join(found)}" if found else ""


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return text.partition("\n")[0]


# --------------------------------------------------------------------------------------- the dense model


def _source(
    model: nn.Module, name: str | None, args: Mapping[str, Any] | None, factory: Factory | None
) -> dict[str, Any]:
    if factory is not None:
        return {"factory": f"{type(model).__module__}.{type(model).__qualname__}"}
    config = getattr(model, "pretrained_cfg", None) or {}
    if name is None:
        name = config.get("architecture")
        args = args or {"num_classes": getattr(model, "num_classes", None)}
        if not name or args.get("num_classes", 0) is None:
            raise InputError(
                f"cannot tell how to build {type(model).__name__} again; pass save(..., model_name=, model_args=) "
                "for a timm model or save(..., factory=) for your own"
            )
    elif ":" in name:  # of a hub or folder, which may be gone: what it stood for is a timm architecture
        args = {**getattr(model, "_model_args", {}), **(args or {})}
        name = config.get("architecture", name)
    source: dict[str, Any] = json.loads(_json({"timm": name, "args": dict(args or {})}))
    return source


def _named(source: _TimmSource | _OwnSource) -> str:
    if isinstance(source, _OwnSource):
        return source.factory
    args = ", ".join(f"{key}={value!r:.40}" for key, value in source.args.items())
    return f"timm's {source.timm!r:.60} ({args})"


def _dense_model(path: Path, structure: _Structure, factory: Factory | None) -> nn.Module:
    source = structure.source
    if factory is not None:
        return _build(factory)
    if isinstance(source, _TimmSource):
        return _build_timm(source.timm, source.args)
    raise FileError(
        f"{path} holds a {source.factory}, which is not a timm model; pass load(..., factory=...), "
        "a function without arguments that builds the dense model"
    )


def _build_timm(name: str, args: Mapping[str, Any]) -> nn.Module:
    import timm

    if ":" in name or not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r:.60}; timm.list_models() lists the names")
    if foreign := sorted(args.keys() & set(_NOT_ARCHITECTURE)):
        raise ModelError(
            f"model_args must not hold {_listed(foreign)}: an artifact has weights of its own; leave it out"
        )
    shown = ", ".join(f"{key}={value!r:.40}" for key, value in args.items())
    return _built(lambda: timm.create_model(name, pretrained=False, **args), f"timm's {name!r} ({shown})")


def _build(factory: Factory) -> nn.Module:
    """A copy of what the caller's factory builds: it may hand out a model that is still in use."""

    def build() -> nn.Module:
        model = factory()
        if not isinstance(model, nn.Module):
            raise TypeError(f"it must be a torch.nn.Module, got {type(model).__name__}")
        return copy.deepcopy(model)

    return _built(build, "what the factory builds")


def _built(build: Factory, what: str) -> nn.Module:
    with torch.random.fork_rng(), torch.device("cpu"):
        try:
            return build().cpu()
        except Exception as error:
            raise ModelError(f"{what}: {_one_line(error)}") from error


# -------------------------------------------------------------------------- what a cut changed, and back


def _json(structure: Mapping[str, Any]) -> str:
    try:
        return json.dumps(structure, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the artifact cannot be described in JSON: {error}; give `info` and `model_args` as finite numbers, "
            "strings, lists and dictionaries"
        ) from error


def _tensors_to_keep(fresh: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the state dict, and the other buffers that a fresh model does not have in the same way.

    Ready for safetensors: on the CPU, contiguous, no two of them in the same memory.
    """
    state = dict(model.state_dict())
    built = dict(fresh.named_buffers(remove_duplicate=False))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in state and name in built and not _equal(buffer, built[name]):
            state[name] = buffer
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise InputError(f"{name} of {type(model).__name__} holds no numbers that could be saved")
        if _dtype_name(tensor) not in _DTYPES or tensor.layout != torch.strided:
            raise InputError(f"{name} cannot be saved: it is a {tensor.layout} tensor of {tensor.dtype}")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _rewrites(model: nn.Module) -> list[dict[str, Any]]:
    """The rewritten places, under the names that their modules have now: a model may have become part of another."""
    return [
        asdict(replace(place, module=name))
        for name, module in model.named_modules()
        for place in rewritten_places(module)
    ]


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())


def _made_plain(fresh: nn.Module, model: nn.Module) -> list[str]:
    """Names of convolutions that are standardised in the fresh model and are not in the cut one."""
    held = dict(model.named_modules())
    return [
        name
        for name, module in fresh.named_modules()
        if is_standardised(module) and name in held and not is_standardised(held[name])
    ]


def _check_same_modules(fresh: nn.Module, model: nn.Module) -> None:
    """Raise InputError if the rebuilt model has other kinds of modules: equal weights would give other logits."""
    built = {name: type(module) for name, module in fresh.named_modules()}
    held = {name: original_class(module) for name, module in model.named_modules()}
    for name in [*held, *built]:
        if built.get(name) is not held.get(name):
            mine, theirs = (one[name].__name__ if name in one else "nothing" for one in (held, built))
            raise InputError(
                f"the model that would be rebuilt differs: {name or 'the model'} is {mine}, rebuilt {theirs}; pass "
                "save(..., model_name=, model_args=) with the arguments it was created with, or factory="
            )


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _settable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Of a module's own attributes those that an artifact may carry: public, and plain data."""
    return {
        key: value
        for key, value in attributes.items()
        if not key.startswith("_") and key != "training" and _plain(value)
    }


def _changed_attributes(fresh: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain public attributes in which the model's modules differ from the fresh ones, by module name."""
    built = {name: _settable(vars(module)) for name, module in fresh.named_modules()}
    changed: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        for key, value in _settable(vars(module)).items():
            if key in built[name] and built[name][key] != value:
                changed.setdefault(name, {})[key] = value
    return changed


def _rehearse_loading(fresh: nn.Module, text: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill the fresh model from what will be written. Raises InputError if that does not work."""
    try:
        _fill_(fresh, _Structure.model_validate_json(text, strict=True), tensors)
    except ValidationError as error:
        raise InputError(f"the artifact could not be loaded again: {_first_mistake(error)}") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the artifact could not be loaded again: {_one_line(error)}") from error


def _bypass_(model: nn.Module, names: list[str]) -> None:
    """Raises InputError for a name that is no module inside of the dense model."""
    try:
        bypass_(model, names)
    except ModelError as error:
        raise InputError(str(error)) from None


def _make_plain_(model: nn.Module, names: list[str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules or not is_standardised(modules[name]):
            raise InputError(f"{name!r:.80} is no weight-standardised convolution of the dense model")
    make_plain_(model, names)


def _fill_(model: nn.Module, structure: _Structure, tensors: Mapping[str, Tensor]) -> None:
    """Turn a freshly built dense model, in which convolutions are plain already, into the recorded one, in place."""
    stored = model.state_dict().keys()
    if missing := sorted(stored - tensors.keys()):
        raise InputError(f"tensors of the dense model are not in the artifact: {_listed(missing)}")
    modules = dict(model.named_modules(remove_duplicate=False))
    holders = {name: _holder(modules, name) for name in tensors}
    for name, tensor in tensors.items():
        _make_room_(holders[name], name.rpartition(".")[2], tensor)
    places = structure.rewrites
    for place in places:
        if place.call < 0 or place.argument < 0 or place.size == 0 or place.size < -1:
            raise InputError(f"a rewrite of {place.module}.{place.method} has an impossible number")
    leave_sizes_to_torch_(model, places)
    _set_attributes_(model, structure.attributes)
    left_out = tensors.keys() - model.state_dict().keys()
    model.load_state_dict({name: tensors[name] for name in tensors if name not in left_out}, strict=True)
    for name in left_out:
        holders[name][name.rpartition(".")[2]] = tensors[name].clone()


def _holder(modules: Mapping[str, nn.Module], name: str) -> dict[str, Any]:
    """The dictionary of a module's parameters or buffers that has a place for the tensor."""
    owner_name, _, key = name.rpartition(".")
    owner = modules.get(owner_name)
    holders: Iterable[dict[str, Any]] = (owner._parameters, owner._buffers) if owner is not None else ()
    for held in holders:
        # Where a dense model has none, a folded constant is the one thing that a cut adds.
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
        settable = _settable(vars(modules[name]))
        for key, value in values.items():
            place = f"{name}.{key}" if name else key
            if key not in settable:
                raise InputError(
                    f"{place} is no plain attribute of the dense model; an artifact sets no others"
                )
            modules[name].__dict__[key] = _of_kind(value, settable[key], place)


def _of_kind(value: Any, built: Any, place: str) -> Any:
    """`value`, if it is the kind of thing that was built, with tuples where JSON only has lists."""
    if built is None:
        return value
    if isinstance(built, (tuple, list)) and isinstance(value, list):
        alike = [*built, *built[-1:] * len(value)]  # what is longer than before goes on as it ended
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
    """As `_of_kind`, for dictionaries: they describe, and a text may be missing from a description."""
    return None if value is None and isinstance(built, (str, list, tuple)) else _of_kind(value, built, place)
