"""The dense model that an artifact starts from: how it is described, and how it is built again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekit.artifact.format import OwnSource, Structure, TimmSource, to_json_text
from sparsekit.errors import FileError, InputError, ModelError, first_line
from sparsekit.evaluation import copied

Factory = Callable[[], nn.Module]


def describe_source(
    model: nn.Module, name: str | None, args: Mapping[str, Any] | None, factory: Factory | None
) -> dict[str, Any]:
    """The `source` of an artifact: what the dense model is. Raises InputError if that cannot be told."""
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
    elif ":" in name:  # of a hub or folder, which may go: name the timm architecture it holds
        args = {**getattr(model, "_model_args", {}), **(args or {})}
        name = config.get("architecture", name)
    source: dict[str, Any] = json.loads(to_json_text({"timm": name, "args": dict(args or {})}))
    return source


def name_source(source: TimmSource | OwnSource) -> str:
    """The dense model as an error message names it."""
    if isinstance(source, OwnSource):
        return source.factory
    args = ", ".join(f"{key}={value!r:.40}" for key, value in source.args.items())
    return f"timm's {source.timm!r:.60} ({args})"


def build_dense_model(path: Path, structure: Structure, factory: Factory | None) -> nn.Module:
    """The dense model of an artifact. Raises FileError if that needs a factory, ModelError if it cannot be built."""
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
    """A timm model with new weights, on the CPU. Raises ModelError for what would need a download or a file."""
    import timm

    from sparsekit.training.models import check_arguments

    if ":" in name or not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r:.60}; timm.list_models() lists the names")
    check_arguments(name, args)
    shown = ", ".join(f"{key}={value!r:.40}" for key, value in args.items())
    return _built(lambda: timm.create_model(name, pretrained=False, **args), f"timm's {name!r} ({shown})")


def build_by_factory(factory: Factory) -> nn.Module:
    """A copy of what the factory returns, which may still be in use. Raises ModelError if that is no module."""

    def build() -> nn.Module:
        model = factory()
        if not isinstance(model, nn.Module):
            raise TypeError(f"it must be a torch.nn.Module, got {type(model).__name__}")
        return copied(model)

    return _built(build, "what the factory builds")


def _built(build: Factory, what: str) -> nn.Module:
    with torch.random.fork_rng(), torch.device("cpu"):
        try:
            return build().cpu()
        except Exception as error:
            raise ModelError(f"{what}: {first_line(error)}") from error
