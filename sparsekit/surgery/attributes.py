"""Read and write the attributes of modules that give sizes, so that they agree with the tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparsekit.structure.counting import CONVOLUTIONS, TRANSPOSED
from sparsekit.structure.places import Attribute, Place
from sparsekit.surgery.attention import refit_attention_
from sparsekit.surgery.layer_norms import ZeroPaddedLayerNorm
from sparsekit.surgery.rewrite_code import leave_sizes_to_torch_, written_number


def read_sizes(model: nn.Module, path: str) -> tuple[int, ...]:
    """The integers that an attribute holds, one or a tuple of them; empty if there is no such attribute.

    A number in the code of a method counts as an attribute, too (`Place.attribute`).
    """
    module, _, name = path.rpartition(".")
    place = Place.of(path)
    try:
        if place is not None:
            number = written_number(model.get_submodule(module), place)
            return () if number is None else (number,)
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
    place = Place.of(str(attribute))
    if place is not None:
        leave_sizes_to_torch_(model, [replace(place, size=size)])
        return
    if attribute.item is None:
        setattr(module, attribute.name, size)
        return
    entries = list(getattr(module, attribute.name))
    entry = entries[attribute.item]
    entries[attribute.item] = {**entry, "num_chs": size} if isinstance(entry, dict) else size
    setattr(module, attribute.name, type(getattr(module, attribute.name))(entries))


def refit_recurrent_(module: nn.RNNBase | nn.RNNCellBase) -> None:
    """Make the sizes of a recurrent layer, and its list of weights, agree with its parameters."""
    if isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
        return
    weights = [getattr(module, name) for name in module._flat_weights_names]
    module._flat_weights = weights
    named = dict(zip(module._flat_weights_names, weights, strict=True))
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.hidden_size, module.input_size = (
        len(named["weight_ih_l0"]) // gates,
        named["weight_ih_l0"].shape[1],
    )
    if module.proj_size:
        module.proj_size = len(named["weight_hr_l0"])


def refit_attributes_(module: nn.Module, *, rows: tuple[int, ...] | None = None) -> None:
    """Make the size attributes of a convolution, linear layer, norm or attention agree with its tensors.

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
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        refit_recurrent_(module)
    elif isinstance(module, ZeroPaddedLayerNorm):
        if "normalized_shape" in vars(module):
            vars(module)["normalized_shape"] = (getattr(module, module.norm_scale).numel(),)
    elif isinstance(module, nn.MultiheadAttention):
        refit_attention_(module)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = weight if weight is not None else module.running_mean
        if sized is not None:
            module.num_features = len(sized)
