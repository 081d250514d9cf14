"""The dense model that an artifact is built on: how it is named, and built again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekit.artifact.format import OwnSource, Structure, TimmSource, as_json_text, listed, one_line
from sparsekit.errors import FileError, InputError, ModelError

Factory = Callable[[], nn.Module]
# Arguments of `timm.create_model` that name weights, files or addresses: an artifact brings its own weights.
_NOT_ARCHITECTURE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def source_of(
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
    source: dict[str, Any] = json.loads(as_json_text({"timm": name, "args": dict(args or {})}))
    return source


def source_name(source: TimmSource | OwnSource) -> str:
    if isinstance(source, OwnSource):
        return source.factory
    args = ", ".join(f"{key}={value!r:.40}" for key, value in source.args.items())
    return f"timm's {source.timm!r:.60} ({args})"


def dense_model(path: Path, structure: Structure, factory: Factory | None) -> nn.Module:
    source = structure.source
    if factory is not None:
        return build_by_factory(factory)
    if isinstance(source, TimmSource):
        return build_timm(source.timm, source.args)
    raise FileError(
        f"{path} holds a {source.factory}, which is not a timm model; pass load(..., factory=...), "
        "a function without arguments that builds the dense model"
    )


def build_timm(name: str, args: Mapping[str, Any]) -> nn.Module:
    import timm

    if ":" in name or not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r:.60}; timm.list_models() lists the names")
    if foreign := sorted(args.keys() & set(_NOT_ARCHITECTURE)):
        raise ModelError(
            f"model_args must not hold {listed(foreign)}: an artifact has weights of its own; leave it out"
        )
    shown = ", ".join(f"{key}={value!r:.40}" for key, value in args.items())
    return _built(lambda: timm.create_model(name, pretrained=False, **args), f"timm's {name!r} ({shown})")


def build_by_factory(factory: Factory) -> nn.Module:
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
            raise ModelError(f"{what}: {one_line(error)}") from error
