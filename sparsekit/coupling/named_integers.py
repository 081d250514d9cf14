"""Integers that know which attribute of the model they are.

`x.reshape(n, self.num_heads, self.head_dim)` needs another `num_heads` once heads are gone. To learn which attribute
sizes which dimension, the integers of a copy are replaced by ones that know their attribute. Torch treats them like
any other, and its arguments show which dimension each of them sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

    Its quotients and products with plain integers know it too; other arithmetic gives plain integers. `divides` is told
    of every quotient by it: the width of a head, which stays when the number of heads changes.
    """

    attribute: Attribute
    divides: Callable[[Attribute, int], None] | None = None

    def __rfloordiv__(self, dividend: Any) -> Any:
        return self._tell(dividend) if type(dividend) is int else NotImplemented

    def __rtruediv__(self, dividend: Any) -> Any:
        if type(dividend) is int and dividend % int(self) == 0:
            return float(self._tell(dividend))
        return int(self).__rtruediv__(dividend)

    def __truediv__(self, divisor: Any) -> Any:
        if isinstance(divisor, NamedInt) and int(self) % int(divisor) == 0:
            divisor._tell(int(self))
        return int(self).__truediv__(int(divisor) if isinstance(divisor, int) else divisor)

    def _tell(self, dividend: int) -> int:
        quotient = dividend // int(self)
        if self.divides is not None and quotient > 0:
            self.divides(self.attribute, quotient)
        return quotient

    def __floordiv__(self, divisor: Any) -> Any:
        if not isinstance(divisor, int):
            return int(self).__floordiv__(divisor)
        if isinstance(divisor, NamedInt):
            divisor._tell(int(self))
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
    def of(
        value: int, attribute: Attribute, divides: Callable[[Attribute, int], None] | None = None
    ) -> NamedInt:
        number = NamedInt(value)
        number.attribute, number.divides = attribute, divides
        return number

    def __deepcopy__(self, memo: dict[int, Any]) -> NamedInt:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def name_integers_(model: nn.Module, divides: Callable[[Attribute, int], None] | None = None) -> None:
    """Replace the sizes among all modules' attributes, also in tuples and lists, by named integers, in place.

    `divides` is told of every quotient by one of them, while it is computed.
    """
    for module_name, module in model.named_modules():
        if isinstance(module, _SIZED_BY_TENSORS):
            continue
        for name, value in list(vars(module).items()):
            if name.startswith("_") or name == "training":
                continue
            if _is_size(value):
                module.__dict__[name] = NamedInt.of(value, Attribute(module_name, name), divides)
            elif type(value) in (tuple, list) and _are_sizes(value):
                entries = (
                    NamedInt.of(v, Attribute(module_name, name, i), divides) if v else v
                    for i, v in enumerate(value)
                )
                module.__dict__[name] = type(value)(entries)


def _are_sizes(values: Sequence[Any]) -> bool:
    """Whether these are sizes, with zeros among them at most, as in the amounts of a padding."""
    return any(_is_size(one) for one in values) and all(type(one) is int and one >= 0 for one in values)


@contextmanager
def uncached_reshapes() -> Iterator[None]:
    """Let einops work out its shapes anew in each call.

    It keeps them by the numbers that they are made of, and would give back those of an earlier call: integers that are
    equal, but know another attribute or none.
    """
    einops: Any = sys.modules.get("einops.einops")
    cached: Any = getattr(einops, "_reconstruct_from_shape", None)
    if not hasattr(cached, "__wrapped__"):
        yield
        return
    einops._reconstruct_from_shape = cached.__wrapped__
    try:
        yield
    finally:
        einops._reconstruct_from_shape = cached


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
