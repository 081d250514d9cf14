"""Cut a model by a plan: the result is a new, smaller module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsekit.structure.places import Attribute
from sparsekit.structure.plan import PrunePlan, TensorCut
from sparsekit.surgery.attention import open_attention_
from sparsekit.surgery.attributes import refit_attributes_, write_size_
from sparsekit.surgery.bypass import bypass_
from sparsekit.surgery.layer_norms import count_zeros_
from sparsekit.surgery.mask import mask_model
from sparsekit.surgery.norms import make_up_for_the_mean_
from sparsekit.surgery.rewrite_code import leave_sizes_to_torch_


def apply_plan(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A new, smaller module without the channels that `plan` drops; `model` is left as it is.

    Constants of dead channels are folded where that is exact. Training flags, devices, dtypes and requires_grad
    carry over. Raises ModelError if the plan names a tensor that the model lacks or has in another size, if it would
    empty a layer, or if the model does not run on inputs of the plan's shapes.
    """
    return cut_masked_(mask_model(model, plan), plan)


def cut_masked_(masked: nn.Module, plan: PrunePlan) -> nn.Module:
    """Cut from a masked model the channels that nothing reads any more, in place."""
    bypass_(masked, (block.module for block in plan.blocks))
    leave_sizes_to_torch_(masked, plan.rewrites)
    planned = {cut.tensor for cut in plan.cuts}
    open_attention_(masked, _holders_of(planned))
    holders = _holders(masked)
    for cut in plan.cuts:
        if cut.role == "size":
            _resize_(masked, cut)
            continue
        if _is_gone(masked, cut):
            continue
        if cut.role == "layer_norm":
            count_zeros_(masked.get_submodule(cut.tensor.rpartition(".")[0]), len(cut.keep) + len(cut.drop))
        _slice_(masked, cut, holders)
        if cut.role == "response":
            make_up_for_the_mean_(masked, cut)
        bias = f"{cut.tensor.removesuffix('weight')}bias"
        if cut.role == "producer" and cut.tensor.endswith("weight") and bias not in planned:
            module = masked.get_submodule(cut.tensor.rpartition(".")[0])
            if isinstance(getattr(module, "bias", None), Tensor):  # made for a folded constant
                _slice_(masked, replace(cut, tensor=bias, dim=0), holders)
    for module in masked.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # on a GPU torch wants them in one piece of memory
    return masked


def _holders_of(tensors: Iterable[str]) -> set[str]:
    """The modules that hold the tensors, and those around them: attention holds its last layer."""
    names = {tensor.rpartition(".")[0] for tensor in tensors}
    return names | {name.rpartition(".")[0] for name in names}


Holders = dict[int, list[tuple[nn.Module, str]]]


def _holders(model: nn.Module) -> Holders:
    """The modules that hold each parameter and buffer, with its name there, by its id."""
    holders: Holders = defaultdict(list)
    for module in model.modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            holders[id(tensor)].append((module, key))
    return holders


def _resize_(model: nn.Module, cut: TensorCut) -> None:
    module, _, name = cut.tensor.rpartition(".")
    held = getattr(model.get_submodule(module), name, None)  # None: the size is written in the code
    item = cut.dim if isinstance(held, (tuple, list)) else None
    write_size_(model, Attribute(module, name, item), len(cut.keep))


def _is_gone(model: nn.Module, cut: TensorCut) -> bool:
    """Whether the tensor does not exist: the gain of a convolution made plain, or a bias that no constant needed."""
    module, _, name = cut.tensor.rpartition(".")
    return name in ("gain", "bias") and getattr(model.get_submodule(module), name, None) is None


def _format_of(tensor: Tensor) -> torch.memory_format:
    """In which order it lies in memory: that of its dimensions, or with the channels last."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    found = formats.get(tensor.dim(), torch.contiguous_format)
    return found if tensor.is_contiguous(memory_format=found) else torch.contiguous_format


def _slice_(model: nn.Module, cut: TensorCut, holders: Holders) -> None:
    """Cut a tensor for every module that holds it: tied weights stay tied."""
    owner_name, _, name = cut.tensor.rpartition(".")
    old = getattr(model.get_submodule(owner_name), name)
    keep = torch.tensor(cut.keep, device=old.device)
    with torch.no_grad():
        new = old.index_select(cut.dim, keep).contiguous(memory_format=_format_of(old))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    held = holders.pop(id(old))
    for module, key in held:
        (module._parameters if key in module._parameters else module._buffers)[key] = new
        refit_attributes_(module, rows=cut.keep if (key, cut.dim) == ("weight", 0) else None)
    holders[id(new)] = held
