"""Training goes on after the cut: the optimizer, the weight average and the schedule move to the smaller model.

    pruned = apply_plan(model, plan)
    new_optimizer = transplant(optimizer, model, pruned, plan)     # momenta follow the channels that stay
    scheduler = rebind_scheduler(scheduler, new_optimizer)         # the learning rate goes on where it was
    ema = transplant_ema(ema, pruned, plan)                        # the average is cut like the model

All three return new objects and leave the old ones as they were, free to train on. Objects are copied attribute by
attribute rather than built anew: what a constructor was called with cannot be told from what it made.
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
    Move,
    check_complete,
    check_held,
    copied_object,
    copied_optimizer,
    find_heirs,
    heir_names,
    prepare_new_parameters_,
)

Anything = TypeVar("Anything")


def transplant(optimizer: AnyOptimizer, model: nn.Module, pruned: nn.Module, plan: PrunePlan) -> AnyOptimizer:
    """A new optimizer of the same class over the parameters of `pruned`, going on where `optimizer` is.

    `model` is the uncut module whose parameters `optimizer` holds (all or some), `pruned` is
    `apply_plan(model, plan)`, on the device and in the dtype it was cut in. Param groups keep their order and
    every option; a group all of whose parameters are gone stays, empty, so that schedules still fit.

    State of a parameter that was cut: a tensor of the parameter's shape becomes
    `state.index_select(dim, keep)` for each (dim, keep) of the plan; numbers and 0-dim tensors (steps) are copied.
    If it has a tensor of any other shape, or a list of tensors (Adafactor's row and column statistics, Kron's
    preconditioners), nothing says which channel an entry belongs to: the parameter starts afresh, its step count
    included. State of a parameter that was not cut is copied as it is. Where the cut folded a constant into a bias,
    copies of the weights kept as state (Lookahead, MADGRAD, ASGD) get the same addition.

    A bias the cut made joins the param group of its module's weight, right behind it, with fresh state (and stays
    out where the weight is not in the optimizer). Parameters that are gone are dropped. Wrappers (Lookahead,
    accelerate's without a gradient scaler) move with the optimizer inside. Hooks move; the handles that remove
    them, and gradients, do not. Neither `optimizer` nor `model` changes, no tensor is shared with them, and no
    random number is drawn.

    Raises InputError for an optimizer with parameters `model` does not have or has twice, whose methods were
    replaced by functions that hold it, or whose state is not kept by parameter (L-BFGS); and if `pruned` is not
    `model` cut by `plan`. Raises VerificationError if in the end a parameter is not in the new optimizer once.
    """
    heirs = find_heirs(model, pruned, plan)
    check_held(optimizer, heirs)
    move = Move(heirs)
    result: AnyOptimizer = copied_optimizer(optimizer, move)
    for old, new in zip(optimizer.param_groups, result.param_groups, strict=True):
        if "param_names" in old:
            new["param_names"] = heir_names(old, heirs)
    for moved in move.copies.values():
        if isinstance(moved, Optimizer):
            prepare_new_parameters_(moved)
    check_complete(optimizer, result, heirs)
    return result


def rebind_scheduler(scheduler: Anything, optimizer: Optimizer) -> Anything:
    """A copy of `scheduler` that steers `optimizer`, which `transplant` made of the one it steers now.

    Its progress is kept: the learning rate goes on exactly where it was. For torch's schedulers (those inside of
    SequentialLR and ChainedScheduler included), timm's, and others that hold their optimizer as `optimizer`.
    Functions given to it (`lr_lambda`) are shared, not copied. The old scheduler goes on steering the old optimizer.

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
    move = Move({}, {id(old): optimizer})
    result: Anything = copied_object(scheduler, move)
    if hasattr(old.step, STEP_MARK) and not hasattr(optimizer.step, STEP_MARK):
        _note_steps_(optimizer)
    return result


def transplant_ema(ema: Anything, pruned: nn.Module, plan: PrunePlan) -> Anything:
    """The weight average of a model, cut as the model was: a new object of the same class.

    `ema` is a module of the uncut model's architecture, or a wrapper that holds one as `module` (timm's ModelEmaV2
    and V3, torch's AveragedModel) or as `ema` (timm's ModelEma); decay, counters and options of a wrapper are kept.
    `pruned` is `apply_plan(model, plan)`. Constants of dead channels are the average's own, and so is what is folded
    of them; where only `pruned` was given a new bias, the average gets one of zeros, because wrappers pair the
    tensors of model and average by their order.

    Raises InputError if `ema` holds no such module, and if a constant of the average would need a bias that
    `pruned` does not have.
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
    result: Any = average if holder is None else copied_object(ema, Move({}, {id(dense): average}))
    return cast(Anything, result)


def _note_steps_(optimizer: Optimizer) -> None:
    """Note that `optimizer.step` was called, as torch's schedulers do: without it their first step warns."""
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
    """Give layers of the average a bias of zeros where only the pruned model's fold made one."""
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
