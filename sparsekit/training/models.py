"""Build timm models by name, load and save their weights, and tell what images they expect."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_data_config
from torch import nn

from sparsekit.errors import FileError, ModelError, first_line, first_names
from sparsekit.files import atomic_path, is_pickle

# What timm takes for many architectures, whether their constructors name it or not.
_COMMON_ARGUMENTS = (
    *("num_classes", "in_chans", "img_size", "drop_rate", "drop_path_rate", "global_pool"),
    *("bn_eps", "bn_momentum", "bn_tf"),
)

_NOT_OF_AN_ARCHITECTURE = {"self", "args", "kwargs", "device", "dtype"}


@dataclass(frozen=True)
class InputConfig:
    """What a model expects of an image.

    input_size: (channels, height, width). mean, std: one number for each channel, for pixels in [0, 1].
    interpolation: a timm name ("bicubic"). crop_pct: share of the resized image that the central crop keeps.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


def create_model(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    image_size: int | None = None,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a timm model; new weights are drawn from the global random state, so seed it before the call.

    `image_size`, in pixels, is used by architectures whose weights depend on it (vision transformers). `checkpoint` is
    a safetensors file whose names and shapes must fit. `args` are further arguments of the architecture.

    Raises ModelError (unknown name, arguments that do not fit, no pretrained weights) and FileError (checkpoint).
    """
    check_name(name)
    check_arguments(name, args or ())
    keywords = {**(args or {}), "num_classes": num_classes, "in_chans": in_chans}
    # Weights from a file replace all others: there is nothing to download.
    download = pretrained and checkpoint is None
    model = _build(name, download, image_size, keywords)
    if checkpoint is not None:
        load_weights_(model, checkpoint, num_classes=num_classes)
    return model


def trained_classes(
    name: str, *, checkpoint: Path | None, image_size: int | None, args: Mapping[str, Any] | None
) -> int:
    """The number of classes that a finished model knows: as its checkpoint says, else as timm does for its weights.

    The random state does not move. Raises ModelError and FileError as `create_model` does.
    """
    check_name(name)
    check_arguments(name, args or ())
    with torch.random.fork_rng():
        model: Any = _build(name, False, image_size, args or {})
    if not _classifier_names(model) or model.num_classes < 1:
        raise ModelError(
            f"{name} has no classifier, so its answers cannot be compared; a recipe needs a model that has one. "
            'For an embedding use sparsekit.prune with outputs="values".'
        )
    if checkpoint is None:
        return int(model.num_classes)
    weights = _read_weights(checkpoint)
    for classifier in _classifier_names(model):
        if f"{classifier}.weight" in weights:
            return len(weights[f"{classifier}.weight"])
    raise FileError(
        f"checkpoint {checkpoint} does not say how many classes it knows: it has no "
        f"{' or '.join(f'{one}.weight' for one in _classifier_names(model))}. "
        "Name the model that it was trained with."
    )


def build_arguments(
    name: str, *, num_classes: int, in_chans: int, image_size: int | None, args: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The keywords with which `timm.create_model` builds what `create_model` built.

    Whether the architecture takes an image size is found by building it. The random state does not move.
    """
    keywords = {**(args or {}), "num_classes": num_classes, "in_chans": in_chans}
    if image_size is None:
        return keywords
    with torch.random.fork_rng():
        try:
            timm.create_model(name, pretrained=False, img_size=image_size, **keywords)
        except TypeError:
            return keywords
    return {**keywords, "img_size": image_size}


def check_arguments(name: str, args: Iterable[str]) -> None:
    """Raise ModelError unless all of these arguments of `timm.create_model` shape the architecture.

    Those are what the constructors in the architecture's file of timm take. Others name files, addresses and weights,
    and some versions of timm unpickle what these name, which can run any code.
    """
    allowed = _shaping_arguments(name)
    refused = [key for key in args if key not in allowed]
    if refused:
        near = difflib.get_close_matches(refused[0], allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {first_names(sorted(allowed))}"
        raise ModelError(f"{name} has no argument {first_names(refused)} that shapes it; {hint}")


def _shaping_arguments(name: str) -> set[str]:
    base = name.split(".")[0]
    if not timm.is_model(base):  # of a hub or a folder, where its architecture is written
        return set(_COMMON_ARGUMENTS)
    module = sys.modules[timm.model_entrypoint(base).__module__]
    of_timm = [
        one for one in vars(module).values() if getattr(one, "__module__", "").startswith("timm.models.")
    ]
    classes = [one for one in of_timm if inspect.isclass(one) and issubclass(one, nn.Module)]
    taken = set(_COMMON_ARGUMENTS)
    for one in classes:
        makers = (
            vars(base)["__init__"] for base in one.__mro__ if "__init__" in vars(base) and base is not object
        )
        named = {key for maker in makers for key in inspect.signature(maker).parameters}
        taken |= named if "num_classes" in named else set()
    return taken - _NOT_OF_AN_ARCHITECTURE - set(inspect.signature(timm.create_model).parameters)


def input_config(
    model: nn.Module,
    *,
    image_size: int | None = None,
    in_chans: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> InputConfig:
    """Input size, normalisation and resizing of `model`: what is given, else what timm has for its weights.

    `in_chans` is by default that of the first convolution. One channel gets the average of mean and std over three.
    Raises ModelError if mean or std have another number of channels.
    """
    channels = _first_in_channels(model) if in_chans is None else in_chans
    given = {"interpolation": interpolation, "crop_pct": crop_pct, "img_size": image_size}
    given = {key: value for key, value in given.items() if value is not None}
    resolved = resolve_data_config(given, model=model)  # type: ignore[no-untyped-call]
    _, height, width = resolved["input_size"]
    return InputConfig(
        input_size=(channels, int(height), int(width)),
        mean=_per_channel("mean", resolved["mean"] if mean is None else mean, channels),
        std=_per_channel("std", resolved["std"] if std is None else std, channels),
        interpolation=str(resolved["interpolation"]),
        crop_pct=float(resolved["crop_pct"]),
    )


def load_weights_(model: nn.Module, checkpoint: Path, *, num_classes: int) -> None:
    """Load a safetensors file into `model` in place; names and shapes must fit exactly. Raises FileError."""
    weights = _read_weights(checkpoint)
    expected = model.state_dict()
    wrong_shape = [
        key for key, value in weights.items() if key in expected and value.shape != expected[key].shape
    ]
    for key in wrong_shape:
        if key.rsplit(".", 1)[0] in _classifier_names(model):
            raise FileError(
                f"checkpoint {checkpoint} was trained for {weights[key].shape[0]} classes ({key}), "
                f"but the data has {num_classes}. Use data with the same classes, or a checkpoint that fits."
            )
    complaints = [
        *_complaint("missing", [key for key in expected if key not in weights]),
        *_complaint("unexpected", [key for key in weights if key not in expected]),
        *_complaint(
            "of another shape",
            [
                f"{key} (file {list(weights[key].shape)}, model {list(expected[key].shape)})"
                for key in wrong_shape
            ],
        ),
    ]
    if complaints:
        raise FileError(
            f"checkpoint {checkpoint} does not fit the model: {'; '.join(complaints)}. "
            "Name the model, its arguments and the image channels it was trained with."
        )
    model.load_state_dict(weights)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's state as a safetensors file that `load_weights_` reads, atomically."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def check_name(name: str) -> None:
    """Raise ModelError if timm has no model of this name."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists the names."
    raise ModelError(f"unknown model {name!r}; {hint}")


def _build(name: str, pretrained: bool, image_size: int | None, keywords: Mapping[str, Any]) -> nn.Module:
    random_state = torch.get_rng_state()
    try:
        if image_size is not None:
            try:
                return timm.create_model(name, pretrained, img_size=image_size, **keywords)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                # It takes no image size: build it as if that had not been tried.
                torch.set_rng_state(random_state)
        return timm.create_model(name, pretrained, **keywords)
    except Exception as error:
        reason = first_line(error)
        if pretrained:
            raise ModelError(
                f"the pretrained weights of {name!r} could not be loaded ({reason}). "
                "Check the name and the network, or set pretrained to false and give a checkpoint."
            ) from error
        wanted = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        raise ModelError(
            f"model {name!r} cannot be built with {wanted}, image size {image_size} ({reason}). "
            "Mend the arguments or the image size."
        ) from error


def _first_in_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(float(value) for value in values)
    if channels == 1 or len(values) == 1:
        return (float(sum(values) / len(values)),) * channels
    raise ModelError(
        f"{name} must have one number for each of the {channels} image channels, got {list(values)}."
    )


def _read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    if not checkpoint.is_file():
        raise FileError(f"checkpoint {checkpoint} does not exist or is no file.")
    if is_pickle(checkpoint):  # unpickling can run any code, so we never do
        target = checkpoint.with_suffix(".safetensors")
        raise FileError(
            f"checkpoint {checkpoint} is a pickle; only safetensors files are read. Convert it once: "
            'python -c "import torch, safetensors.torch as s; '
            f"w = torch.load('{checkpoint}', weights_only=True, map_location='cpu'); "
            "w = {k: v.clone().contiguous() for k, v in w.get('state_dict', w).items()}; "
            f"s.save_file(w, '{target}')\""
        )
    try:
        return load_file(checkpoint)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"checkpoint {checkpoint} is damaged or no safetensors file ({error}).") from error


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _complaint(kind: str, keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    return [f"{len(keys)} {kind}: {first_names(keys)}"]
