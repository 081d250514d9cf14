"""Run only the rest of a network: what ran before a changed layer is not computed again.

A model's forward pass runs from its start, but modules that stand before the change give what they gave before. This
needs no knowledge of how the model is built: its code runs as it is, with these modules answering from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.evaluation import evaluating, flat_tensors
from sparsekit.options import Outputs
from sparsekit.repair.divergence import compared
from sparsekit.structure.groups import ChannelGroups

# A station takes at most this share of the MACs, if it can be divided.
_LARGEST_SHARE = 0.1


@dataclass(frozen=True)
class Stations:
    """Modules that do not hold each other, in running order.

    Each runs once, gives one tensor, and does not overwrite what it reads.
    """

    names: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, groups: ChannelGroups, inputs: tuple[Tensor, ...]) -> Stations:
        """Find them by one run on `inputs`: the largest modules that take a small share of the MACs."""
        calls = _calls(model, inputs)
        macs = {layer.weight.rpartition(".")[0]: layer.macs for layer in groups.layers}
        total = max(sum(macs.values()), 1)
        chosen: list[str] = []

        def descend(name: str, module: nn.Module) -> None:
            share = sum(n for layer, n in macs.items() if f"{layer}.".startswith(f"{name}.") or not name)
            children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
            if not share:
                return
            small = share <= _LARGEST_SHARE * total or not children
            if name in calls and small:
                chosen.append(name)
                return
            for child in children:
                descend(*child)

        descend("", model)
        return Stations(tuple(sorted(chosen, key=lambda name: calls[name])))

    def first_of(self, tensors: Iterable[str]) -> int:
        """Return the number of the first station that holds one of these tensors; 0 if one is outside of all."""
        first = len(self.names)
        for tensor in tensors:
            held = [i for i, name in enumerate(self.names) if tensor.startswith(f"{name}.")]
            if not held:
                return 0
            first = min(first, held[0])
        return first


class Recording:
    """One batch with what each station of a model gave for it, and the model's outputs, which are of `kind`."""

    def __init__(
        self, model: nn.Module, stations: Stations, inputs: tuple[Tensor, ...], kind: Outputs = "classes"
    ) -> None:
        self._stations, self.inputs, self._kind = stations, inputs, kind
        self._given: list[Tensor] = []
        with evaluating(model), ExitStack() as hooks:
            for name in stations.names:
                hooks.enter_context(_noting(model.get_submodule(name), self._given))
            self.outputs = compared(model(*inputs), kind)

    def outputs_from(self, model: nn.Module, first: int) -> list[Tensor]:
        """Return the outputs of the model, with all stations before number `first` giving what they gave."""
        with evaluating(model), ExitStack() as replaced:
            for name, given in zip(self._stations.names[:first], self._given, strict=False):
                replaced.enter_context(answering(model.get_submodule(name), given))
            return compared(model(*self.inputs), self._kind)

    def is_needed(self, model: nn.Module, first: int, numbers: Iterable[int]) -> bool:
        """Whether the rest of the network, from station `first` on, needs what one of these stations gave."""
        kept, poisoned = self._given, list(self._given)
        for number in numbers:
            poisoned[number] = torch.full_like(kept[number], torch.nan)
        self._given = poisoned
        try:
            outputs = self.outputs_from(model, first)
        finally:
            self._given = kept
        return any(bool(output.isnan().any()) for output in outputs)

    @property
    def n_bytes(self) -> int:
        """Memory of what the stations gave."""
        return sum(given.numel() * given.element_size() for given in self._given)


def _calls(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Number the modules that run once, give one tensor and leave what they read, in running order."""
    order: list[str] = []
    fit: set[str] = set()
    versions: dict[str, list[int]] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            versions[name] = [read._version for read in flat_tensors([args, keywords])]

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            order.append(name)
            left = versions[name] == [read._version for read in flat_tensors([args, keywords])]
            if isinstance(output, Tensor) and left:
                fit.add(name)

        return hook

    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in modules]
    hooks += [module.register_forward_hook(after(name), with_kwargs=True) for name, module in modules]
    try:
        with evaluating(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: i for i, name in enumerate(order) if order.count(name) == 1 and name in fit}


@contextmanager
def _noting(module: nn.Module, given: list[Tensor]) -> Iterator[None]:
    """Append a copy of what the module gives: models change tensors in place."""
    hook = module.register_forward_hook(lambda m, args, output: given.append(output.clone()))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def answering(module: nn.Module, given: Tensor, *, copied: bool = True) -> Iterator[None]:
    """Let the module give `given`, whatever it is called with; a copy, because models work in place."""
    before = vars(module).get("forward")
    vars(module)["forward"] = lambda *args, **keywords: given.clone() if copied else given
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def batches_of(inputs: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Split inputs along their first dimension into parts of `size` at most, as equal as possible."""
    n = -(-len(inputs[0]) // size)
    yield from zip(*(x.tensor_split(n) for x in inputs), strict=True)
