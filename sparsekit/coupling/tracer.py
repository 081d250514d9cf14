"""What is known of each tensor while a model runs: its labels, whether it is a weight, whose output it is.

`rules` say how this passes from an operator's inputs to its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from sparsekit.coupling.labels import along
from sparsekit.coupling.observations import Atoms, Observations
from sparsekit.coupling.place_finder import PlaceFinder

_MOST_LABELS = 2**21


@dataclass(frozen=True)
class Known:
    """What is known of one tensor.

    labels: arrays of different spans. weight: it is made of parameters and buffers alone. feeds: atoms that it is
    zero without, None where they are not known. squashed: it went through a sigmoid or softmax since. origin: the
    weight of the layer whose output it is, moved at most.
    """

    labels: tuple[Tensor, ...] = ()
    weight: bool = False
    feeds: Atoms | None = None
    squashed: bool = False
    origin: str | None = None


@dataclass(frozen=True)
class OperatorCall:
    """One executed operator: its bare name, its arguments, the tensors among them, and the tensors it returned."""

    name: str
    operator: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema, wherever it was given, or the schema's default."""
        for position, argument in enumerate(self.operator._schema.arguments):
            if argument.name == name:
                return self.arg(position, name, argument.default_value)
        return default


class Tracer:
    """Holds what is known of every live tensor while the model runs, and all that was seen."""

    def __init__(self, model: nn.Module, *, through_layer_norm: bool = False) -> None:
        self.seen = Observations()
        self.through_layer_norm = through_layer_norm
        self.places = PlaceFinder(model)
        self._known: MutableMapping[Tensor, Known] = WeakTensorKeyDictionary()
        self._names: MutableMapping[Tensor, str] = WeakIdKeyDictionary()
        self._if_read: MutableMapping[Tensor, tuple[Tensor, str]] = WeakTensorKeyDictionary()
        self._parameters = dict(model.named_parameters())
        self._tensors: dict[str, Tensor] = {**self._parameters, **dict(model.named_buffers())}
        for name, tensor in self._tensors.items():
            self._names[tensor] = name

    def known(self, tensor: Tensor) -> Known:
        """What is known of a tensor; the atoms of a parameter or buffer are numbered when it is first met."""
        if tensor in self._known:
            return self._known[tensor]
        if tensor not in self._names:
            return Known()
        name = self._names[tensor]
        labels = []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                first = self.seen.add_axis(name, dim, size).first
                atoms = torch.arange(first, first + size, dtype=torch.float32)
                labels.append(along(atoms, dim, tensor.dim()))
        known = Known(tuple(labels), weight=True)
        self._known[tensor] = known
        return known

    def unread(self) -> tuple[str, ...]:
        """The names of all parameters that no operator has read so far."""
        return tuple(name for name, tensor in self._parameters.items() if tensor not in self._known)

    def name_of(self, tensor: Tensor | None) -> str | None:
        """The tensor's name, if it is a parameter or buffer."""
        return None if tensor is None else self._names.get(tensor)

    def beside(self, tensor: Tensor | None, *names: str) -> list[Tensor]:
        """The parameters and buffers of these names in the module that holds a tensor, as far as there are any."""
        holder = (self.name_of(tensor) or "").rpartition(".")[0]
        found = (self._tensors.get(f"{holder}.{name}" if holder else name) for name in names)
        return [one for one in found if one is not None]

    def learn(self, tensor: Tensor, known: Known) -> None:
        """Note what is known of an output. Arrays of very many labels are given up: their atoms are fixed."""
        for labels in known.labels:
            if labels.numel() > _MOST_LABELS:
                self.seen.fix(labels, "it is spread over too many places to follow")
                known = replace(known, labels=tuple(one for one in known.labels if one is not labels))
        self._known[tensor] = known

    def fix_if_read(self, result: Tensor, labels: Tensor, reason: str) -> None:
        """Note that these atoms must stay if anything reads `result`: attention weights are often thrown away."""
        self._if_read[result] = (labels, reason)

    def settle(self, tensor: Tensor) -> None:
        """Note that something reads the tensor: an operator, or whoever called the model."""
        if tensor in self._if_read:
            self.seen.fix(*self._if_read.pop(tensor))

    def read(self, tensor: Tensor, norm: str = "") -> None:
        """Note what reads a layer's output: a normalisation, by the name of its weight, or anything else ("")."""
        origin = self.known(tensor).origin
        if origin is not None:
            self.seen.norms.setdefault(origin, set()).add(norm)


# Notes what is seen in one call, and what is known of its outputs.
Rule = Callable[[Tracer, OperatorCall], None]
