"""Bypass whole residual blocks: in place of each stands a module that passes its input on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sparsekit.errors import ModelError


class Passthrough(nn.Module):
    """Returns its first argument, whatever else it is given."""

    def forward(self, x: Any, *args: Any, **keywords: Any) -> Any:
        """`x`, as it is."""
        return x


def bypass_(model: nn.Module, names: Iterable[str]) -> None:
    """Put a `Passthrough` where each named module is registered, in place.

    Raises ModelError if there is no such module.
    """
    for name in names:
        modules = dict(model.named_modules(remove_duplicate=False))
        if not name or name not in modules:
            raise ModelError(f"{type(model).__name__} has no module {name!r:.80} that could be bypassed")
        stand_in = Passthrough().train(modules[name].training)
        for parent in modules.values():
            for key, child in parent._modules.items():
                if child is modules[name]:
                    parent._modules[key] = stand_in


def bypassed(model: nn.Module) -> list[str]:
    """Names of the modules that only pass their input on."""
    return [name for name, module in model.named_modules() if isinstance(module, Passthrough)]
