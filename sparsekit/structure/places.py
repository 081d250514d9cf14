"""Where a size stands in a model: an integer attribute, or a place in the code of a method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Attribute:
    """An integer attribute of a module (`item` None), or one entry of a tuple or list attribute.

    An entry may also be a dictionary whose "num_chs" is meant: timm's `feature_info` is a list of those.
    """

    module: str
    name: str
    item: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path if self.item is None else f"{path}[{self.item}]"


@dataclass(frozen=True, order=True)
class Place:
    """A size in a reshape: argument `argument` of call number `call` (in the order of the source) of a module's method.

    `source` is the hash of the method's text that the numbers belong to. `size` is what stands there instead: -1, or,
    where the call leaves another size to torch already, the number it has to be (the width of a head, which stays).
    """

    module: str
    method: str
    call: int
    argument: int
    source: str
    size: int = -1
