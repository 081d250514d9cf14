"""Read and write the attributes of modules that give sizes, so that they agree with the tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsekit.structure.counting import CONVOLUTIONS, TRANSPOSED
from sparsekit.structure.places import Attribute
from sparsekit.surgery.attention import refit_attention_


def read_sizes(model: nn.Module, path: str) -> tuple[int, ...]:
    """The integers that an attribute holds, one or a tuple of them; empty if there is no such attribute."""
    module, _, name = path.rpartition(".")
    try:
        value = getattr(model.get_submodule(module), name)
    except AttributeError:
        return ()
    entries = value if isinstance(value, (tuple, list)) else (value,)
    sizes: tuple[Any, ...] = tuple(
        entry.get("num_chs") if isinstance(entry, dict) else entry for entry in entries
    )
    return sizes if all(isinstance(size, int) for size in sizes) else ()


def write_size_(model: nn.Module, attribute: Attribute, size: int) -> None:
    """Set the attribute, or one entry of it, to `size`; a tuple or list is replaced by a new one of its kind."""
    module = model.get_submodule(attribute.module)
    if attribute.item is None:
        setattr(module, attribute.name, size)
        return
    entries = list(getattr(module, attribute.name))
    entry = entries[attribute.item]
    entries[attribute.item] = {**entry, "num_chs": size} if isinstance(entry, dict) else size
    setattr(module, attribute.name, type(getattr(module, attribute.name))(entries))


def refit_attributes_(module: nn.Module, *, rows: tuple[int, ...] | None = None) -> None:
    """Make the size attributes of a convolution, linear layer, BatchNorm or attention agree with its tensors.

    `rows` are those of the weight that were kept: a grouped convolution keeps the groups that they lie in.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, TRANSPOSED):
        assert isinstance(weight, Tensor)
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, CONVOLUTIONS):
        assert isinstance(weight, Tensor)
        if rows is not None:
            module.groups = len({row // (module.out_channels // module.groups) for row in rows})
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        assert isinstance(weight, Tensor)
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.MultiheadAttention):
        refit_attention_(module)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = weight if weight is not None else module.running_mean
        if sized is not None:
            module.num_features = len(sized)
