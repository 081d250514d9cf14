"""The cut itself: a plan and a model give a new, smaller module; and the proof that both agree."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.bypass import bypass_
from sparsekit.errors import ModelError, VerificationError
from sparsekit.fold import blank_columns_, fold_constants_
from sparsekit.layer_norms import normalise_all_, normalise_what_stays_
from sparsekit.modes import comparing, flat_tensors, random_inputs
from sparsekit.plan import PrunePlan, TensorCut
from sparsekit.rewriting import leave_sizes_to_torch_
from sparsekit.sizes import Attribute, read_sizes, write_size_
from sparsekit.standardised import is_standardised, make_plain_


def mask_model(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of full size in which nothing reads the dropped channels: what the cut model has to reproduce.

    Raises ModelError if the plan does not fit the model, or the model does not run on inputs of the plan's shapes.
    """
    _check_fits(model, plan)
    masked = _with_plain_readers(model, plan)
    _silence_blocks_(masked, plan)
    fold_constants_(masked, plan)
    _silence_(masked, plan)
    _confine_layer_norms_(masked, plan)
    return masked


def detached(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """As `mask_model`, with constants of dead channels dropped instead of folded."""
    copied = _with_plain_readers(model, plan)
    _silence_blocks_(copied, plan)
    blank_columns_(copied, plan)
    _silence_(copied, plan)
    _confine_layer_norms_(copied, plan)
    return copied


def _with_plain_readers(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy in which no layer that loses columns computes its filters from all of them."""
    copied = copy.deepcopy(model)
    readers = {cut.tensor.rpartition(".")[0] for cut in plan.cuts if cut.role == "consumer"}
    make_plain_(copied, sorted(name for name in readers if is_standardised(copied.get_submodule(name))))
    return copied


def _silence_blocks_(model: nn.Module, plan: PrunePlan) -> None:
    """Blocks that go add nothing to what they read; in place."""
    with torch.no_grad():
        for block in plan.blocks:
            for scale in block.scales:
                model.get_parameter(scale).zero_()


def _silence_(model: nn.Module, plan: PrunePlan) -> None:
    """Where a response norm looks at all channels, those that go have to be zero, not only unread; in place."""
    if not any(cut.role == "response" for cut in plan.cuts):
        return
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for cut in plan.cuts:
            if cut.role not in ("consumer", "response") and cut.tensor in tensors:
                tensor = tensors[cut.tensor]
                tensor.index_fill_(cut.dim, torch.tensor(cut.drop, device=tensor.device), 0)


def _confine_layer_norms_(model: nn.Module, plan: PrunePlan) -> None:
    """Layer norms that lose channels look at those that stay, as the cut ones will; in place."""
    for cut in plan.cuts:
        if cut.role == "layer_norm" and cut.tensor.endswith("weight"):
            normalise_what_stays_(model.get_submodule(cut.tensor.rpartition(".")[0]), cut.keep)


def apply_plan(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A new, smaller module without the channels that `plan` drops; `model` is left as it is.

    Constants of dead channels are folded where that is exact. Training flags, devices, dtypes and requires_grad
    carry over. Raises ModelError if the plan names a tensor the model does not have or of another size, would empty
    a layer, or has inputs that the model does not take.
    """
    return cut_masked_(mask_model(model, plan), plan)


def cut_masked_(masked: nn.Module, plan: PrunePlan) -> nn.Module:
    """Take out of a masked model what nothing reads any more, in place."""
    bypass_(masked, (block.module for block in plan.blocks))
    leave_sizes_to_torch_(masked, plan.rewrites)
    planned = {cut.tensor for cut in plan.cuts}
    holders = _holders(masked)
    for cut in plan.cuts:
        if cut.role == "size":
            _resize_(masked, cut)
            continue
        if _is_gone(masked, cut):
            continue
        _slice_(masked, cut, holders)
        if cut.role == "layer_norm":
            normalise_all_(masked.get_submodule(cut.tensor.rpartition(".")[0]))
        if cut.role == "response":
            _make_up_for_the_mean_(masked, cut)
        bias = f"{cut.tensor.removesuffix('weight')}bias"
        if cut.role == "producer" and cut.tensor.endswith("weight") and bias not in planned:
            module = masked.get_submodule(cut.tensor.rpartition(".")[0])
            if isinstance(getattr(module, "bias", None), Tensor):  # made for a folded constant
                _slice_(masked, replace(cut, tensor=bias, dim=0), holders)
    return masked


def _check_fits(model: nn.Module, plan: PrunePlan) -> None:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for scale in (scale for block in plan.blocks for scale in block.scales):
        if scale not in tensors:
            raise ModelError(
                f"the plan does not fit the model: there is no {scale}, which scales a block that goes; apply a plan "
                "to the model whose groups it was made from"
            )
    for cut in plan.cuts:
        if cut.role == "producer" and cut.tensor.endswith("bias") and cut.tensor not in tensors:
            continue  # of a composed plan: the first cut may have made it, for a constant
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


def _is_gone(model: nn.Module, cut: TensorCut) -> bool:
    """Whether it is the gain of a convolution that was standardised, or a bias no constant was folded into."""
    module, _, name = cut.tensor.rpartition(".")
    return name in ("gain", "bias") and getattr(model.get_submodule(module), name, None) is None


def _resize_(model: nn.Module, cut: TensorCut) -> None:
    module, _, name = cut.tensor.rpartition(".")
    item = cut.dim if isinstance(getattr(model.get_submodule(module), name), (tuple, list)) else None
    write_size_(model, Attribute(module, name, item), len(cut.keep))


Holders = dict[int, list[tuple[nn.Module, str]]]


def _holders(model: nn.Module) -> Holders:
    """By the identity of each parameter and buffer, the modules that hold it and its name there."""
    holders: Holders = defaultdict(list)
    for module in model.modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            holders[id(tensor)].append((module, key))
    return holders


def _slice_(model: nn.Module, cut: TensorCut, holders: Holders) -> None:
    """Cut a tensor for every module that holds it: tied weights stay tied."""
    owner_name, _, name = cut.tensor.rpartition(".")
    old = getattr(model.get_submodule(owner_name), name)
    keep = torch.tensor(cut.keep, device=old.device)
    with torch.no_grad():
        new = old.index_select(cut.dim, keep).contiguous()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    held = holders.pop(id(old))
    for module, key in held:
        (module._parameters if key in module._parameters else module._buffers)[key] = new
        refit_attributes_(module, rows=cut.keep if (key, cut.dim) == ("weight", 0) else None)
    holders[id(new)] = held


def _make_up_for_the_mean_(model: nn.Module, cut: TensorCut) -> None:
    """Of a norm over d channels, of which k stay: epsilon times d / k, and the scale to suit.

    With m the mean over all d channels and m' that over the k that stay, the others being zero, m = m' k / d. So for
    a global response norm x / (m + eps) = (d / k) x / (m' + eps d / k), and for a root mean square norm, m being that
    of squares, x / sqrt(m + eps) = sqrt(d / k) x / sqrt(m' + eps d / k): exactly.
    """
    module: Any = model.get_submodule(cut.tensor.rpartition(".")[0])
    ratio = (len(cut.keep) + len(cut.drop)) / len(cut.keep)
    is_root_mean_square = hasattr(module, "normalized_shape")
    with torch.no_grad():
        module.weight.mul_(ratio**0.5 if is_root_mean_square else ratio)
    module.eps *= ratio
    if is_root_mean_square:
        module.normalized_shape = (len(cut.keep),)


def refit_attributes_(module: nn.Module, *, rows: tuple[int, ...] | None = None) -> None:
    """Make the size attributes of a convolution, linear layer or BatchNorm agree with its tensors.

    `rows` of the weight were kept: a grouped convolution has as many blocks left as these lie in.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        assert isinstance(weight, Tensor)
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        assert isinstance(weight, Tensor)
        if rows is not None:
            module.groups = len({row // (module.out_channels // module.groups) for row in rows})
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        assert isinstance(weight, Tensor)
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = weight if weight is not None else module.running_mean
        if sized is not None:
            module.num_features = len(sized)


@dataclass(frozen=True)
class Agreement:
    """Largest absolute difference of two models' outputs, and the largest absolute output it is measured against."""

    max_abs: float
    scale: float

    @property
    def max_rel(self) -> float:
        """`max_abs` relative to the largest output; 0 for two models that both put out nothing but zeros."""
        return self.max_abs / self.scale if self.scale > 0 else self.max_abs


def compare_outputs(
    first: nn.Module,
    second: nn.Module,
    input_shapes: tuple[tuple[int, ...], ...],
    *,
    batches: tuple[int, ...] = (1, 3),
    seed: int = 0,
) -> Agreement:
    """Largest difference of two models on random inputs of several batch sizes, in eval mode.

    Raises VerificationError if the outputs differ in number, in shape or in being finite.
    """
    found = []
    for batch in batches:
        inputs = random_inputs(input_shapes, seed + batch, first, batch)
        found.append(agreement(outputs(first, inputs), outputs(second, inputs)))
    return Agreement(max(one.max_abs for one in found), max(one.scale for one in found))


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All tensors the model returns, in eval mode and true float32."""
    with comparing(model):
        return flat_tensors(model(*inputs))


def agreement(ours: list[Tensor], theirs: list[Tensor]) -> Agreement:
    """Largest difference of two models' outputs on the same inputs.

    Raises VerificationError if they differ in number, in shape or in being finite.
    """
    max_abs = scale = 0.0
    shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"outputs have different shapes: {shapes[0]} and {shapes[1]}")
    for mine, other in zip(ours, theirs, strict=True):
        if not mine.numel():
            continue
        difference = float((mine - other).abs().max())
        if difference != difference:
            raise VerificationError("an output is not a number")
        max_abs, scale = max(max_abs, difference), max(scale, float(mine.abs().max()))
    return Agreement(max_abs, scale)


def verify_cut(model: nn.Module, pruned: nn.Module, plan: PrunePlan, *, tolerance: float = 1e-4) -> Agreement:
    """Prove the surgery: the masked dense model and the cut one agree within `tolerance` of the largest output.

    Raises VerificationError if they do not, or the cut one does not run.
    """
    masked = mask_model(model, plan)
    try:
        agreement = compare_outputs(masked, pruned, plan.input_shapes)
    except VerificationError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise VerificationError(f"the cut model does not run: {reason}; nothing was written") from error
    if not agreement.max_rel <= tolerance:
        raise VerificationError(
            f"the cut model differs from the masked one by {agreement.max_abs:.3g} (largest output "
            f"{agreement.scale:.3g}, tolerance {tolerance:g}); nothing was written"
        )
    return agreement
