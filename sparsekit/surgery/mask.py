"""Mask a model by a plan: it keeps its full size, but nothing reads the channels that the plan drops."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsekit.errors import ModelError
from sparsekit.evaluation import copied
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.attributes import read_sizes
from sparsekit.surgery.constants import blank_columns_, fold_constants_
from sparsekit.surgery.norms import make_readers_plain_


def mask_model(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of full size in which nothing reads the dropped channels: the cut model has to compute the same.

    Raises ModelError if the plan does not fit the model, or the model does not run on inputs of the plan's shapes.
    """
    _check_fits(model, plan)
    return _masked(model, plan, fold_constants_)


def detached(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """As `mask_model`, but constants of dead channels are lost, not folded, and the plan is not checked."""
    return _masked(model, plan, blank_columns_)


def with_plain_readers(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy in which standardised convolutions that lose columns are plain."""
    plain = copied(model)
    make_readers_plain_(plain, (cut.tensor for cut in plan.cuts if cut.role == "consumer"))
    return plain


def _check_fits(model: nn.Module, plan: PrunePlan) -> None:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for scale in (scale for block in plan.blocks for scale in block.scales):
        if scale not in tensors and not _may_be_made(scale, tensors):
            raise ModelError(
                f"the plan does not fit the model: there is no {scale}, which silences a block that goes; apply a plan "
                "to the model whose groups it was made from"
            )
    for cut in plan.cuts:
        if cut.role == "producer" and cut.tensor.endswith("bias") and cut.tensor not in tensors:
            continue  # in a composed plan the first cut may make this bias, for a constant
        if cut.tensor.endswith(".gain") and cut.tensor not in tensors:
            continue  # the convolution was standardised, and was made plain since
        size = len(cut.keep) + len(cut.drop)
        if cut.role == "size":
            found = read_sizes(model, cut.tensor)
        else:
            found = tuple(tensors[cut.tensor].shape) if cut.tensor in tensors else ()
        if found[cut.dim : cut.dim + 1] != (size,):
            raise ModelError(
                f"the plan does not fit the model: {cut.tensor} needs size {size} in dimension {cut.dim}, "
                f"found {found or 'nothing'}; apply a plan to the model whose groups it was made from"
            )
        if not cut.keep:
            raise ModelError(f"the plan keeps nothing of {cut.tensor}; a layer must not be emptied")


def _may_be_made(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is the bias of a layer without one: in a composed plan the first cut may make it, for a constant."""
    return name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in tensors


def _masked(
    model: nn.Module, plan: PrunePlan, detach_: Callable[[nn.Module, PrunePlan], object]
) -> nn.Module:
    """A copy in which `detach_` takes the dropped channels from the layers that read them."""
    masked = with_plain_readers(model, plan)
    _silence_blocks_(masked, plan)
    detach_(masked, plan)
    _silence_(masked, plan)
    return masked


def _silence_blocks_(model: nn.Module, plan: PrunePlan) -> None:
    """Set what silences residual blocks that go to zero, in place."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for block in plan.blocks:
            for scale in block.scales:
                if scale in tensors:  # else it is a bias that would be made
                    tensors[scale].zero_()


def _silence_(model: nn.Module, plan: PrunePlan) -> None:
    """Set what makes dropped channels to zero, where something adds them up; in place."""
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for cut in plan.cuts:
            if cut.silenced and cut.tensor in tensors:  # else it is a bias that would be made
                tensor = tensors[cut.tensor]
                tensor.index_fill_(cut.dim, torch.tensor(cut.silenced, device=tensor.device), 0)
