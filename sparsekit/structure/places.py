"""Places where a model has a size written down: an integer attribute, or an argument in the code of a method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Attribute:
    """An integer attribute of a module or, with `item`, one entry of a tuple or list.

    The entry may be a dictionary; then its "num_chs" is meant, as in timm's `feature_info`.
    """

    module: str
    name: str
    item: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path if self.item is None else f"{path}[{self.item}]"


@dataclass(frozen=True, order=True)
class Place:
    """A size in a reshape: an argument of a call (numbered in the order of the source) in a method of a module.

    Quotients, such as the width of a head, are numbered behind the reshapes, calls of torch's attention behind these.
    `method` may go on with the global functions that lead to the place, as in "forward/attend". `source` is the hash of
    the text of the method, or of the last function, that the numbers belong to. `size` is what is written there
    instead: -1, or a number (such as the width of a head) where the call already leaves another size to torch.
    """

    module: str
    method: str
    call: int
    argument: int
    source: str
    size: int = -1

    @property
    def attribute(self) -> Attribute:
        """A number that is written in this place, as if the module had it in an attribute."""
        return Attribute(self.module, f"{self.method}:{self.call}:{self.argument}:{self.source}")

    @staticmethod
    def of(path: str) -> Place | None:
        """The place that such an attribute stands for, by its full name; None for a real attribute."""
        module, _, name = path.rpartition(".")
        parts = name.split(":")
        if len(parts) != 4 or not (parts[1].isdecimal() and parts[2].isdecimal()):
            return None
        method, call, argument, source = parts
        return Place(module, method, int(call), int(argument), source)
