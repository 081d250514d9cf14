"""`save` and `load`: a pruned model as safetensors and JSON, without pickle.

An artifact is a folder of two files. `model.safetensors` holds every tensor by its state-dict name.
`structure.json` holds what is needed to build the module that the tensors fit:

    format       "sparsekit/1"
    source       {"timm": name, "args": {...}} or {"factory": "package.module.Class"} (a note for the reader)
    attributes   per module, the plain attributes that differ from a freshly built dense model (sizes, groups)
    tensors      name -> [dtype, shape]
    rewrites     places in the code of modules that leave a size to torch (module, method, call, argument, source hash)
    sha256       of model.safetensors
    plan         what was cut, as PrunePlan.to_json gives it, or null
    info         whatever the caller adds: class names, input size, mean, std, accuracy, recipe
    versions     of sparsekit, torch and timm

Loading builds the dense model again, gives every tensor the recorded shape, sets the attributes and fills in the
numbers; the plan is not needed for it, so a model that was cut twice loads like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sparsekit.errors import FileError, InputError, VerificationError
from sparsekit.files import atomic_path, write_json
from sparsekit.modes import evaluating
from sparsekit.plan import PrunePlan
from sparsekit.rewriting import Place, leave_sizes_to_torch_, original_class, rewritten_places

FORMAT = "sparsekit/1"
Factory = Callable[[], nn.Module]
# What building and filling a model raises when the structure, the weights and the model are not of one kind.
_MISFITS = (
    InputError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    safetensors.SafetensorError,
)


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
    The dense model is built once to check that the artifact can be loaded. Raises InputError if it cannot be
    built, its tensors have other names than the model's, or `info` is not plain JSON.
    """
    path = Path(path)
    state = _unshared(model.state_dict())
    source, build = _source(model, model_name, model_args, factory)
    fresh = _build(build)
    _check_same_modules(fresh, model)
    structure = {
        "format": FORMAT,
        "source": source,
        "attributes": _changed_attributes(fresh, model),
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()},
        "rewrites": [asdict(place) for module in model.modules() for place in rewritten_places(module)],
        "plan": plan.to_json() if plan else None,
        "info": dict(info or {}),
        "versions": {name: version(name) for name in ("sparsekit", "torch", "timm")},
    }
    _shape_like_(fresh, structure)  # raises if the dense model cannot take the tensors
    _check_json(structure)  # before anything is written: the folder may hold an artifact already
    if path.exists() and not path.is_dir():
        raise FileError(f"cannot save an artifact to {path}: it is a file; name a folder")
    with atomic_path(path / "model.safetensors") as temporary:
        safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
        structure["sha256"] = _sha256(temporary)
    write_json(path / "structure.json", structure, indent=None)  # a plan has thousands of indices
    return path


def load(path: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """The model an artifact holds, on the CPU, in eval mode, with equal logits. Nothing is unpickled.

    `factory` builds the dense model if it is not timm's. The caller's random state does not move. Raises
    FileError if the folder is no artifact, is damaged, was written by a newer format, or does not fit the model.
    """
    path = Path(path)
    structure = read_structure(path)
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise FileError(f"{path} has no model.safetensors; the artifact is incomplete, copy the whole folder")
    if _sha256(weights) != structure["sha256"]:
        raise FileError(
            f"{weights} does not have the hash that structure.json records: it is damaged or replaced"
        )
    source = structure["source"]
    if "timm" in source:
        model = _build(_timm_factory(source["timm"], source["args"]))
    elif factory is not None:
        model = _build(factory)
    else:
        raise FileError(
            f"{path} holds a {source['factory']}, which is not a timm model; pass load(..., factory=...), "
            "a function without arguments that builds the dense model"
        )
    try:
        _shape_like_(model, structure)
        model.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    except _MISFITS as error:
        raise FileError(f"{path} does not fit {source}: {error}") from error
    return model.eval()


def read_structure(path: str | Path) -> dict[str, Any]:
    """The content of an artifact's structure.json. Raises FileError if `path` is no artifact."""
    file = Path(path) / "structure.json"
    try:
        structure = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} is no sparsekit artifact: it has no structure.json") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{file} cannot be read: {error}") from error
    if not isinstance(structure, dict):
        raise FileError(f"{file} is no artifact's structure: expected a JSON object, got {structure!r:.40}")
    missing = [
        key
        for key in ("format", "source", "attributes", "tensors", "rewrites", "sha256")
        if key not in structure
    ]
    if structure.get("format") != FORMAT or missing:
        raise FileError(
            f"{file} has format {structure.get('format')!r} and lacks {missing or 'nothing'}; this version of "
            f"sparsekit reads {FORMAT!r}"
        )
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
    with evaluating(model):
        expected, found = model(inputs), loaded(inputs)
    difference = float((expected - found).abs().max())
    if not difference <= tolerance * float(expected.abs().max()):
        raise VerificationError(
            f"the artifact {path} gives other logits than the model: off by {difference:.3g}"
        )
    return difference


def _check_json(structure: Mapping[str, Any]) -> None:
    try:
        json.dumps(structure, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the artifact cannot be described in JSON: {error}; give `info` and `model_args` as finite numbers, "
            "strings, lists and dictionaries"
        ) from error


def _source(
    model: nn.Module, name: str | None, args: Mapping[str, Any] | None, factory: Factory | None
) -> tuple[dict[str, Any], Factory]:
    if factory is not None:
        return {"factory": f"{type(model).__module__}.{type(model).__qualname__}"}, factory
    if name is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        name = config.get("architecture")
        args = args or {"num_classes": getattr(model, "num_classes", None)}
        if not name or args.get("num_classes", 0) is None:
            raise InputError(
                f"cannot tell how to build {type(model).__name__} again; pass save(..., model_name=, model_args=) "
                "for a timm model or save(..., factory=) for your own"
            )
    args = dict(args or {})
    return {"timm": name, "args": args}, _timm_factory(name, args)


def _timm_factory(name: str, args: Mapping[str, Any]) -> Factory:
    def build() -> nn.Module:
        import timm

        try:
            model: nn.Module = timm.create_model(name, pretrained=False, **args)
        except Exception as error:
            raise FileError(f"timm cannot build {name!r} with {dict(args)}: {error}") from error
        return model

    return build


def _build(factory: Factory) -> nn.Module:
    with torch.random.fork_rng():
        return factory().cpu()


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors ready for safetensors: on the CPU, contiguous, no two of them in the same memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _check_same_modules(fresh: nn.Module, model: nn.Module) -> None:
    """Raise InputError if the rebuilt model has other kinds of modules: equal weights would give other logits."""
    built = {name: type(module) for name, module in fresh.named_modules()}
    for name, module in model.named_modules():
        if built.get(name) is not original_class(module):
            found = built[name].__name__ if name in built else "nothing"
            raise InputError(
                f"the model that would be rebuilt differs: {name or 'the model'} is a {type(module).__name__}, rebuilt "
                f"{found}; pass save(..., model_name=, model_args=) with the arguments it was created with, or factory="
            )


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _changed_attributes(fresh: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain public attributes in which the model's modules differ from the fresh ones, by module name."""
    built = dict(fresh.named_modules())
    changed: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        reference = vars(built[name]) if name in built else {}
        for key, value in vars(module).items():
            if key.startswith("_") or key == "training" or key not in reference or not _plain(value):
                continue
            if reference[key] != value:
                changed.setdefault(name, {})[key] = list(value) if isinstance(value, tuple) else value
    return changed


def _shape_like_(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Give every tensor of `model` the recorded shape and dtype, and every module its recorded attributes."""
    recorded: dict[str, tuple[str, list[int]]] = {
        name: (d, s) for name, (d, s) in structure["tensors"].items()
    }
    missing = sorted(set(model.state_dict()) - set(recorded))
    if missing:
        raise InputError(f"tensors of the dense model are not in the artifact: {', '.join(missing[:5])}")
    for name, (dtype_name, shape) in recorded.items():
        owner_name, _, key = name.rpartition(".")
        dtype = getattr(torch, dtype_name, None)
        try:
            owner = model.get_submodule(owner_name)
            old = getattr(owner, key)
        except AttributeError:
            raise InputError(f"the dense model has no {name}") from None
        if old is None and key != "bias":  # a folded constant is the one thing a cut adds
            raise InputError(f"the dense model has no {name}")
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"{name} has the unknown dtype {dtype_name!r}")
        if old is not None and list(old.shape) == shape and old.dtype == dtype:
            continue
        empty = torch.empty(shape, dtype=dtype)
        if isinstance(old, nn.Parameter):
            old.data = empty  # in place: tied parameters stay tied
        else:
            setattr(owner, key, nn.Parameter(empty) if old is None else empty)
    leave_sizes_to_torch_(model, [Place(**place) for place in structure["rewrites"]])
    for name, attributes in structure["attributes"].items():
        module = model.get_submodule(name)
        for key, value in attributes.items():
            reference = getattr(module, key)
            setattr(module, key, tuple(value) if isinstance(reference, tuple) else value)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
