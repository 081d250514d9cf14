"""Move the optimizer, the schedule and the weight average to the cut model, so that training goes on there.

    pruned = apply_plan(model, plan)
    new_optimizer = transplant(optimizer, model, pruned, plan)     # momenta follow the channels that stay
    scheduler = rebind_scheduler(scheduler, new_optimizer)         # the learning rate goes on where it was
    ema = transplant_ema(ema, pruned, plan)                        # the average is cut like the model

All three return new objects and leave the old ones as they were. Objects are copied attribute by attribute, because
nobody knows what their constructors were called with.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekit.errors import InputError
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.optimizer_state import (
    STEP_MARK,
    AnyOptimizer,
    Copying,
    check_complete,
    check_optimizer,
    copy_object,
    copy_value,
    heir_names,
    match_parameters,
    prepare_new_parameters_,
)

Anything = TypeVar("Anything")


def transplant(optimizer: AnyOptimizer, model: nn.Module, pruned: nn.Module, plan: PrunePlan) -> AnyOptimizer:
    """A new optimizer of the same class over the parameters of `pruned`, going on where `optimizer` is.

    `model` is the uncut module whose parameters `optimizer` holds, all or some; `pruned` is `apply_plan(model, plan)`,
    on the same device and in the same dtype. Param groups keep their order and options; a group whose parameters are
    all gone stays, empty, so that schedules still fit.

    State of a parameter that was cut: tensors of its shape are cut like it, numbers and 0-dim tensors (steps) are
    copied. If it has a tensor of another shape or a list of tensors (Adafactor's statistics, Kron's preconditioners),
    nothing says which channel an entry belongs to, and the parameter starts afresh, its step count included. Where the
    cut folded a constant into a bias, copies of the weights kept as state (Lookahead, MADGRAD, ASGD) get it too.

    A bias that the cut made comes behind its module's weight, with fresh state; if that weight is not in the optimizer,
    the bias is not either. Wrappers (Lookahead, accelerate's without a gradient scaler) move with the optimizer inside.
    Hooks move; the handles that remove them, and gradients, do not. `optimizer` and `model` do not change, no tensor is
    shared with them, and no random number is drawn.

    Raises InputError for an optimizer that holds a parameter that is not the model's or holds one twice, whose methods
    were replaced by functions that hold it, or whose state is not kept by parameter (L-BFGS), and if `pruned` is not
    `model` cut by `plan`. Raises VerificationError if the new optimizer does not hold every parameter once.
    """
    heirs = match_parameters(model, pruned, plan)
    check_optimizer(optimizer, heirs)
    copying = Copying(heirs)
    result: AnyOptimizer = copy_value(optimizer, copying)
    for old, new in zip(optimizer.param_groups, result.param_groups, strict=True):
        if "param_names" in old:
            new["param_names"] = heir_names(old, heirs)
    for moved in copying.copies.values():
        if isinstance(moved, Optimizer):
            prepare_new_parameters_(moved)
    check_complete(optimizer, result, heirs)
    return result


def rebind_scheduler(scheduler: Anything, optimizer: Optimizer) -> Anything:
    """A copy of `scheduler` that steers `optimizer`, which `transplant` made of the one it steers now.

    The learning rate goes on exactly where it was. This works for torch's schedulers (SequentialLR and ChainedScheduler
    included), timm's, and others that hold their optimizer as `optimizer`. Functions given to it (`lr_lambda`) are
    shared, not copied. The old scheduler goes on steering the old optimizer.

    Raises InputError for an object without an optimizer, for an optimizer that lacks param groups or options the
    schedule works on, and for a scheduler with functions that hold the old optimizer.
    """
    old = getattr(scheduler, "optimizer", None)
    if not isinstance(old, Optimizer):
        raise InputError(
            f"a scheduler must hold its optimizer as `optimizer`, got {type(scheduler).__name__}, which does not; "
            "if it wraps another scheduler, pass that one"
        )
    lacking = [
        sorted(set(mine) - set(theirs))
        for mine, theirs in zip(old.param_groups, optimizer.param_groups, strict=False)
    ]
    if len(old.param_groups) != len(optimizer.param_groups) or any(lacking):
        raise InputError(
            f"the new optimizer does not fit the schedule of {type(scheduler).__name__}: it has "
            f"{len(optimizer.param_groups)} param groups of {len(old.param_groups)} needed, which lack the options "
            f"{sorted({option for options in lacking for option in options})}; pass what transplant() returned"
        )
    copying = Copying({}, {id(old): optimizer})
    result: Anything = copy_object(scheduler, copying)
    if hasattr(old.step, STEP_MARK) and not hasattr(optimizer.step, STEP_MARK):
        _note_steps_(optimizer)
    return result


def transplant_ema(ema: Anything, pruned: nn.Module, plan: PrunePlan) -> Anything:
    """The weight average of a model, cut as the model was: a new object of the same class.

    `ema` is a module of the uncut model's architecture, or a wrapper that holds one as `module` (timm's ModelEmaV2
    and V3, torch's AveragedModel) or as `ema` (timm's ModelEma); a wrapper keeps its decay, counters and options.
    `pruned` is `apply_plan(model, plan)`. What is folded are the average's own constants. Where only `pruned` got a new
    bias, the average gets one of zeros, because wrappers pair tensors by their order.

    Raises InputError if `ema` holds no such module, or if a constant of the average needs a bias that `pruned` lacks.
    """
    holders = (n for n in ("module", "ema") if isinstance(getattr(ema, n, None), nn.Module))
    holder = next((name for name in holders if not hasattr(pruned, name)), None)
    dense = ema if holder is None else getattr(ema, holder)
    if not isinstance(dense, nn.Module):
        raise InputError(
            "a weight average must be a module, or hold one as `module` or `ema`, got "
            f"{type(ema).__name__}, which does not; pass the averaged module itself"
        )
    average = apply_plan(dense, plan)
    _match_biases_(average, pruned)
    result: Any = average if holder is None else copy_object(ema, Copying({}, {id(dense): average}))
    return cast(Anything, result)


def _note_steps_(optimizer: Optimizer) -> None:
    """Let `optimizer.step` note that it was called, as torch's schedulers expect: else their first step warns."""
    reference = weakref.ref(optimizer)
    step: Callable[..., Any] = getattr(optimizer.step, "__func__", type(optimizer).step)

    @functools.wraps(step)
    def noting(*args: Any, **keywords: Any) -> Any:
        stepped = reference()
        setattr(stepped, "_opt_called", True)  # noqa: B010
        return step(stepped, *args, **keywords)

    setattr(noting, STEP_MARK, True)
    setattr(optimizer, "step", noting)  # noqa: B010


def _match_biases_(average: nn.Module, pruned: nn.Module) -> None:
    """Give layers of the average a bias of zeros where only the pruned model got one; in place."""
    ours, theirs = average.state_dict(), pruned.state_dict()
    if extra := sorted(ours.keys() - theirs.keys()):
        raise InputError(
            f"the weight average does not fit the pruned model, which has no {', '.join(extra)}: channels that are "
            "zero in the model still give a constant in its average; before the cut, set in the average to zero what "
            "is zero in the model (Sparsifier.project_)"
        )
    for name in sorted(theirs.keys() - ours.keys()):
        owner, _, last = name.rpartition(".")
        layer = average.get_submodule(owner)
        if last != "bias" or not isinstance(layer.weight, Tensor):
            raise InputError(f"the weight average is of another model: it lacks {name} of the pruned model")
        zeros = layer.weight.new_zeros(theirs[name].shape)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
    shapes = average.state_dict()
    for name, tensor in theirs.items():
        if shapes[name].shape != tensor.shape:
            raise InputError(
                f"the weight average is of another model: {name} has shape {tuple(shapes[name].shape)}, "
                f"{tuple(tensor.shape)} in the pruned model"
            )
