"""Integers that know which attribute of the model they are.

`x.reshape(n, self.num_heads, self.head_dim)` needs another `num_heads` once heads are gone. To learn which attribute
sizes which dimension, the integers of a copy are replaced by ones that know their attribute. Torch treats them like
any other, and its arguments show which dimension each of them sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsekit.structure.places import Attribute

# The sizes of these layers follow from their tensors.
_SIZED_BY_TENSORS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


class PartInt(int):
    """A named integer divided by a plain one: an equal part of what the attribute sizes."""

    whole: NamedInt


class MultipleInt(int):
    """A named integer times a plain one: the attribute sizes the `inner` part of a dimension, or the outer one."""

    attribute: Attribute
    times: int
    inner: bool


class NamedInt(int):
    """An integer that knows its attribute.

    Its quotients and products with plain integers know it too; other arithmetic gives plain integers.
    """

    attribute: Attribute

    def __floordiv__(self, divisor: Any) -> Any:
        if not isinstance(divisor, int):
            return int(self).__floordiv__(divisor)
        part = PartInt(int(self) // int(divisor))
        part.whole = self
        return part

    def __mul__(self, factor: Any) -> Any:
        return self._times(factor, inner=False)

    def __rmul__(self, factor: Any) -> Any:
        return self._times(factor, inner=True)

    def _times(self, factor: Any, *, inner: bool) -> Any:
        if type(factor) is not int:
            return int(self) * int(factor) if isinstance(factor, int) else NotImplemented
        product = MultipleInt(int(self) * factor)
        product.attribute, product.times, product.inner = self.attribute, factor, inner
        return product

    @staticmethod
    def of(value: int, attribute: Attribute) -> NamedInt:
        number = NamedInt(value)
        number.attribute = attribute
        return number

    def __deepcopy__(self, memo: dict[int, Any]) -> NamedInt:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def name_integers_(model: nn.Module) -> None:
    """Replace the sizes among all modules' attributes, also in tuples and lists, by named integers, in place."""
    for module_name, module in model.named_modules():
        if isinstance(module, _SIZED_BY_TENSORS):
            continue
        for name, value in list(vars(module).items()):
            if name.startswith("_") or name == "training":
                continue
            if _is_size(value):
                module.__dict__[name] = NamedInt.of(value, Attribute(module_name, name))
            elif type(value) in (tuple, list) and _are_sizes(value):
                entries = (
                    NamedInt.of(v, Attribute(module_name, name, i)) if v else v for i, v in enumerate(value)
                )
                module.__dict__[name] = type(value)(entries)


def _are_sizes(values: Sequence[Any]) -> bool:
    """Whether these are sizes, with zeros among them at most, as in the amounts of a padding."""
    return any(_is_size(one) for one in values) and all(type(one) is int and one >= 0 for one in values)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
