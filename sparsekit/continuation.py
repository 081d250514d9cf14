"""Training goes on after the cut: the optimizer, the weight average and the schedule move to the smaller model.

    pruned = apply_plan(model, plan)
    new_optimizer = transplant(optimizer, model, pruned, plan)     # momenta follow the channels that stay
    scheduler = rebind_scheduler(scheduler, new_optimizer)         # the learning rate goes on where it was
    ema = transplant_ema(ema, pruned, plan)                        # the average is cut like the model

All three return new objects and leave the old ones as they were, free to train on. Objects are copied attribute by
attribute rather than built anew: what a constructor was called with cannot be told from what it made.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sparsekit.errors import InputError, VerificationError
from sparsekit.modes import flat_tensors
from sparsekit.plan import PrunePlan
from sparsekit.surgery import apply_plan

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
Anything = TypeVar("Anything")

# State that is a copy of the weights, not of gradients: Lookahead's slow weights, MADGRAD's first and ASGD's average.
_COPIES_OF_WEIGHTS = ("lookahead_slow_buff", "x0", "ax")
# What torch's schedulers mark their wrapper of `optimizer.step` with.
_STEP_MARK = "_wrapped_by_lr_sched"


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
    heirs = _find_heirs(model, pruned, plan)
    _check_held(optimizer, heirs)
    move = _Move(heirs)
    result: AnyOptimizer = _copied(optimizer, move)
    for old, new in zip(optimizer.param_groups, result.param_groups, strict=True):
        if "param_names" in old:
            new["param_names"] = _names(old, heirs)
    for moved in move.copies.values():
        if isinstance(moved, Optimizer):
            _prepare_new_parameters_(moved)
    _check_complete(optimizer, result, heirs)
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
    move = _Move({}, {id(old): optimizer})
    result: Anything = _copied_object(scheduler, move)
    if hasattr(old.step, _STEP_MARK) and not hasattr(optimizer.step, _STEP_MARK):
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
    result: Any = average if holder is None else _copied_object(ema, _Move({}, {id(dense): average}))
    return cast(Anything, result)


# ---- which parameters follow which


@dataclass(frozen=True)
class _Heir:
    """A parameter of the pruned model: `keeps` are the positions that stay, by dimension; None if it is new."""

    name: str
    parameter: nn.Parameter
    keeps: Mapping[int, tuple[int, ...]] | None

    def inherit(self, tensor: Tensor) -> Tensor:
        """The entries of `tensor`, of the old parameter's shape, that belong to what stays."""
        if not self.keeps:
            return tensor.detach().clone()
        for dim, keep in self.keeps.items():
            tensor = tensor.index_select(dim, torch.tensor(keep, device=tensor.device))
        return tensor.detach().clone(memory_format=torch.contiguous_format)


_Heirs = Mapping[int, list[_Heir]]


def _find_heirs(model: nn.Module, pruned: nn.Module, plan: PrunePlan) -> _Heirs:
    """For the id of each parameter of `model`, what stands in its place: one, none if it is gone, more if it was tied
    under two names and no longer is; and behind them the biases that the cut made.
    """
    old = dict(model.named_parameters(remove_duplicate=False))
    new = dict(pruned.named_parameters(remove_duplicate=False))
    keeps: dict[int, dict[int, tuple[int, ...]]] = {id(parameter): {} for parameter in new.values()}
    for cut in plan.cuts:
        # Buffers and sizes have no state; a parameter that is gone has no heir.
        if cut.tensor in old and cut.tensor in new:
            size, shape = len(cut.keep) + len(cut.drop), tuple(old[cut.tensor].shape)
            if shape[cut.dim : cut.dim + 1] != (size,):
                raise _does_not_fit(
                    cut.tensor, f"needs size {size} in dimension {cut.dim} uncut, got {shape}"
                )
            if keeps[id(new[cut.tensor])].setdefault(cut.dim, cut.keep) != cut.keep:
                raise _does_not_fit(cut.tensor, "it is tied to a parameter that is cut in another way")
    heirs: dict[int, list[_Heir]] = {id(parameter): [] for parameter in old.values()}
    for name, parameter in new.items():
        ancestor = name if name in old else f"{name.rpartition('.')[0]}.weight".lstrip(".")
        if ancestor not in old or (name not in old and not name.endswith("bias")):
            raise _does_not_fit(name, "the uncut model has no such parameter, and the cut makes only biases")
        heir = _Heir(name, parameter, keeps[id(parameter)] if name in old else None)
        if name in old:
            _check_fits(name, old[name], heir)
        if all(other.parameter is not parameter for other in heirs[id(old[ancestor])]):
            heirs[id(old[ancestor])].append(heir)
    return heirs


def _check_fits(name: str, old: nn.Parameter, heir: _Heir) -> None:
    shape = list(old.shape)
    for dim, keep in (heir.keeps or {}).items():
        shape[dim] = len(keep)
    found = heir.parameter
    if list(found.shape) != shape:
        raise _does_not_fit(name, f"needs shape {tuple(shape)}, got {tuple(found.shape)}")
    if (found.device, found.dtype) != (old.device, old.dtype):
        raise _does_not_fit(name, f"needs {old.dtype} on {old.device}, got {found.dtype} on {found.device}")


def _does_not_fit(name: str, why: str) -> InputError:
    return InputError(
        f"the pruned model is not the model cut by this plan: {name}: {why}; pass pruned = apply_plan(model, plan) "
        "with the model and the plan given here"
    )


def _check_held(optimizer: Optimizer, heirs: _Heirs) -> None:
    if isinstance(optimizer, LBFGS):
        raise InputError(
            "the state of LBFGS spans all parameters at once and cannot follow channels; make a new LBFGS over "
            "pruned.parameters()"
        )
    seen: set[int] = set()
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            where = f"parameter {position} of param group {index}, of shape {tuple(parameter.shape)},"
            if id(parameter) not in heirs:
                raise InputError(
                    f"{where} is not a parameter of the model; pass the uncut model that this "
                    f"{type(optimizer).__name__} was made for (unwrapped, with its parameters not replaced since)"
                )
            if id(parameter) in seen:
                raise InputError(f"{where} is in the optimizer twice; list every parameter once")
            seen.add(id(parameter))


def _names(group: Mapping[str, Any], heirs: _Heirs) -> list[str]:
    """The first to follow a parameter keeps the name its caller gave it."""
    return [
        name if heir.keeps is not None and index == 0 else heir.name
        for parameter, name in zip(group["params"], group["param_names"], strict=True)
        for index, heir in enumerate(heirs[id(parameter)])
    ]


def _check_complete(old: Optimizer, new: Optimizer, heirs: _Heirs) -> None:
    """Every heir of what the old optimizer held is in the new one exactly once, and nothing else is."""
    held = [heir for group in old.param_groups for p in group["params"] for heir in heirs[id(p)]]
    wanted = sorted(id(heir.parameter) for heir in held)
    found = sorted(id(p) for group in new.param_groups for p in group["params"])
    if found != wanted or len(set(found)) != len(found):
        names = {id(heir.parameter): heir.name for heir in held}
        wrong = [name for key, name in names.items() if found.count(key) != 1]
        raise VerificationError(
            f"the new {type(new).__name__} does not hold each parameter of the pruned model once: "
            f"{', '.join(wrong) or 'it holds others as well'}; make a new optimizer over pruned.parameters()"
        )


# ---- copying


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@dataclass(frozen=True)
class _Move:
    """One act of copying: heirs of parameters, copies made so far by the id of the original, and how a tensor is
    copied.
    """

    heirs: _Heirs
    copies: dict[int, Any] = field(default_factory=dict)
    tensor: Callable[[Tensor], Tensor] = _clone


def _copied(value: Any, move: _Move) -> Any:
    """A copy that shares no state: optimizers, schedulers, containers, tensors and random generators are copied,
    parameters replaced by their heirs, methods bound to the copy of their object; all else is shared.
    """
    if id(value) in move.copies:
        return move.copies[id(value)]
    if isinstance(value, (Optimizer, LRScheduler)):
        return _copied_object(value, move)
    if isinstance(value, types.MethodType):
        owner = move.copies.get(id(value.__self__), value.__self__)
        return types.MethodType(value.__func__, owner)
    if isinstance(value, nn.Parameter):
        heirs = move.heirs.get(id(value))
        return value if heirs is None else next((heir.parameter for heir in heirs), None)
    if isinstance(value, types.FunctionType):
        _check_free(value, move)
        return value
    if isinstance(value, Tensor):
        made: Any = move.tensor(value)
    elif isinstance(value, dict):
        made = _copied_dict(value, move)
    elif isinstance(value, (list, deque)) or type(value) in (tuple, set):
        made = _copied_sequence(value, move)
    elif isinstance(value, (random.Random, torch.Generator)):
        made = copy.deepcopy(value)
    else:
        return value
    move.copies[id(value)] = made
    return made


def _copied_object(old: Any, move: _Move) -> Any:
    """A new object of the same class with copies of all attributes; its constructor is not called."""
    new = object.__new__(type(old))
    move.copies[id(old)] = new
    for name, value in vars(old).items():
        if name == "step" and hasattr(value, _STEP_MARK):
            continue  # it steps the old optimizer; rebind_scheduler makes another
        new.__dict__[name] = _copied(value, move)
    return new


def _check_free(function: types.FunctionType, move: _Move) -> None:
    """Refuse a function that closes over an object being replaced: itself, a method of it, or a weak reference."""
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a name that is not yet, or no longer, bound
            continue
        content = content() if isinstance(content, weakref.ref) else content
        content = getattr(content, "__self__", content)
        if isinstance(content, (Optimizer, LRScheduler)) and id(content) in move.copies:
            raise InputError(
                f"the function {function.__qualname__}, which the optimizer or scheduler calls, holds the old "
                f"{type(content).__name__} and would go on using it; remove it before, or pass the object that was "
                "wrapped, and set it again after"
            )


def _copied_sequence(value: Any, move: _Move) -> Any:
    """The same kind of container; a parameter makes place for all its heirs."""
    items: list[Any] = []
    for item in value:
        heirs = move.heirs.get(id(item))
        items.extend([_copied(item, move)] if heirs is None else [heir.parameter for heir in heirs])
    if isinstance(value, (tuple, set)):
        return type(value)(items)
    made = copy.copy(value)
    made.clear()
    made.extend(items)
    return made


def _copied_dict(value: dict[Any, Any], move: _Move) -> dict[Any, Any]:
    """The same kind of dict; what was kept for a parameter is handed to its heirs."""
    made = copy.copy(value)
    made.clear()
    for key, entry in value.items():
        heirs = move.heirs.get(id(key))
        if heirs is None:
            made[key] = _copied(entry, move)
            continue
        for heir in heirs:
            if heir.keeps is not None and (not heir.keeps or _has_channels(entry, key)):
                made[heir.parameter] = _inherited(entry, key, heir, move)
    return made


def _has_channels(state: Any, parameter: Tensor) -> bool:
    """Whether every tensor in it is a scalar, or has an entry for each of the parameter's."""
    if isinstance(state, Tensor):
        return not state.dim() or state.shape == parameter.shape
    if isinstance(state, dict):
        return all(_has_channels(entry, parameter) for entry in state.values())
    # Tensors in a list are factors, one a dimension; those of a square weight have its shape by accident.
    return not any(tensor.dim() for tensor in flat_tensors(state))


def _inherited(state: Any, old: Tensor, heir: _Heir, move: _Move) -> Any:
    def pick(tensor: Tensor) -> Tensor:
        return heir.inherit(tensor) if tensor.shape == old.shape else _clone(tensor)

    # With copies of its own: several heirs of one parameter each need their state.
    made = _copied(state, replace(move, copies={}, tensor=pick))
    if isinstance(made, dict):
        for name in _COPIES_OF_WEIGHTS:
            if isinstance(made.get(name), Tensor):
                with torch.no_grad():
                    made[name] += heir.parameter - heir.inherit(old)  # a folded constant, else zero
    return made


# ---- what new objects need


def _prepare_new_parameters_(optimizer: Optimizer) -> None:
    """Give parameters without state what their class prepares for them at construction.

    Most optimizers start a parameter's state at its first step; Adagrad and Adahessian do it in their constructor,
    and fail without. It is learned from a second instance. Where that cannot be made (wrappers), the class is taken
    to be of the first kind.
    """
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in optimizer.param_groups]
    try:
        accepted = inspect.signature(type(optimizer)).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            second = type(optimizer)(groups, **options)
    except Exception:  # any constructor, called with a guess
        return
    for parameter, state in second.state.items():
        if state and not optimizer.state.get(parameter):
            optimizer.state[parameter] = state


def _note_steps_(optimizer: Optimizer) -> None:
    """Note that `optimizer.step` was called, as torch's schedulers do: without it their first step warns."""
    reference = weakref.ref(optimizer)
    step: Callable[..., Any] = getattr(optimizer.step, "__func__", type(optimizer).step)

    @functools.wraps(step)
    def noting(*args: Any, **keywords: Any) -> Any:
        stepped = reference()
        setattr(stepped, "_opt_called", True)  # noqa: B010
        return step(stepped, *args, **keywords)

    setattr(noting, _STEP_MARK, True)
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
