"""Copy an optimizer for the cut model: match old and new parameters, and hand state from one to the other."""

from __future__ import annotations

import copy
import inspect
import random
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sparsekit.errors import InputError, VerificationError
from sparsekit.evaluation import flat_tensors
from sparsekit.structure.plan import PrunePlan

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
# State that copies weights: Lookahead's slow weights, those that MADGRAD started from, ASGD's average.
_COPIES_OF_WEIGHTS = ("lookahead_slow_buff", "x0", "ax")
# What torch's schedulers mark their wrapper of `optimizer.step` with.
STEP_MARK = "_wrapped_by_lr_sched"


@dataclass(frozen=True)
class Heir:
    """A parameter of the pruned model that follows one of the uncut model.

    `keeps` are the positions that stay, by dimension; None if the cut made the parameter.
    """

    name: str
    parameter: nn.Parameter
    keeps: Mapping[int, tuple[int, ...]] | None

    def inherit(self, tensor: Tensor) -> Tensor:
        """The entries that stay of `tensor`, which has the old parameter's shape."""
        if not self.keeps:
            return tensor.detach().clone()
        for dim, keep in self.keeps.items():
            tensor = tensor.index_select(dim, torch.tensor(keep, device=tensor.device))
        return tensor.detach().clone(memory_format=torch.contiguous_format)


Heirs = Mapping[int, list[Heir]]


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@dataclass(frozen=True)
class Copying:
    """The state of one act of copying.

    heirs: those of each parameter. copies: made so far, by the id of the original. tensor: how a tensor is copied.
    """

    heirs: Heirs
    copies: dict[int, Any] = field(default_factory=dict)
    tensor: Callable[[Tensor], Tensor] = _clone


def match_parameters(model: nn.Module, pruned: nn.Module, plan: PrunePlan) -> Heirs:
    """The heirs of each parameter of `model` in `pruned`, by its id.

    One heir is the rule. There is none if the parameter is gone, and more than one if it was tied under two names and
    no longer is. A bias that the cut made comes behind the heirs of its module's weight.
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
    heirs: dict[int, list[Heir]] = {id(parameter): [] for parameter in old.values()}
    for name, parameter in new.items():
        ancestor = name if name in old else f"{name.rpartition('.')[0]}.weight".lstrip(".")
        if ancestor not in old or (name not in old and not name.endswith("bias")):
            raise _does_not_fit(name, "the uncut model has no such parameter, and the cut makes only biases")
        heir = Heir(name, parameter, keeps[id(parameter)] if name in old else None)
        if name in old:
            _check_fits(name, old[name], heir)
        if all(other.parameter is not parameter for other in heirs[id(old[ancestor])]):
            heirs[id(old[ancestor])].append(heir)
    return heirs


def check_optimizer(optimizer: Optimizer, heirs: Heirs) -> None:
    """Raise InputError for parameters without heirs or held twice, and for state that is not kept by parameter."""
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


def copy_value(value: Any, copying: Copying) -> Any:
    """A copy of any value that shares no state with it.

    Optimizers, schedulers, containers, tensors and random generators are copied. Parameters are replaced by their
    heirs, and methods are bound to the copy of their object. All else is shared.
    """
    if id(value) in copying.copies:
        return copying.copies[id(value)]
    if isinstance(value, (Optimizer, LRScheduler)):
        return copy_object(value, copying)
    if isinstance(value, types.MethodType):
        owner = copying.copies.get(id(value.__self__), value.__self__)
        return types.MethodType(value.__func__, owner)
    if isinstance(value, nn.Parameter):
        heirs = copying.heirs.get(id(value))
        return value if heirs is None else next((heir.parameter for heir in heirs), None)
    if isinstance(value, types.FunctionType):
        _check_free(value, copying)
        return value
    if isinstance(value, Tensor):
        made: Any = copying.tensor(value)
    elif isinstance(value, dict):
        made = _copy_dict(value, copying)
    elif isinstance(value, (list, deque)) or type(value) in (tuple, set):
        made = _copy_sequence(value, copying)
    elif isinstance(value, (random.Random, torch.Generator)):
        made = copy.deepcopy(value)
    else:
        return value
    copying.copies[id(value)] = made
    return made


def copy_object(old: Any, copying: Copying) -> Any:
    """A new object of the same class with copies of all attributes; its constructor is not called."""
    new = object.__new__(type(old))
    copying.copies[id(old)] = new
    for name, value in vars(old).items():
        if name == "step" and hasattr(value, STEP_MARK):
            continue  # it steps the old optimizer; rebind_scheduler makes another
        new.__dict__[name] = copy_value(value, copying)
    return new


def heir_names(group: Mapping[str, Any], heirs: Heirs) -> list[str]:
    """Names for the heirs of a param group: the first heir of a parameter keeps the name that the caller gave it."""
    return [
        name if heir.keeps is not None and index == 0 else heir.name
        for parameter, name in zip(group["params"], group["param_names"], strict=True)
        for index, heir in enumerate(heirs[id(parameter)])
    ]


def prepare_new_parameters_(optimizer: Optimizer) -> None:
    """Give parameters without state what their class prepares for them at construction.

    Most optimizers start a parameter's state at its first step. Adagrad and Adahessian start it in their constructor
    and fail without it; it is taken from a second instance. Where there can be none (wrappers), nothing is done.
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


def check_complete(old: Optimizer, new: Optimizer, heirs: Heirs) -> None:
    """Raise VerificationError unless the new optimizer holds every heir of the old parameters once, and no other."""
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


def _check_fits(name: str, old: nn.Parameter, heir: Heir) -> None:
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


def _check_free(function: types.FunctionType, copying: Copying) -> None:
    """Raise InputError for a function that holds an object being replaced, one of its methods, or a weak reference."""
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a name that is not yet, or no longer, bound
            continue
        content = content() if isinstance(content, weakref.ref) else content
        content = getattr(content, "__self__", content)
        if isinstance(content, (Optimizer, LRScheduler)) and id(content) in copying.copies:
            raise InputError(
                f"the function {function.__qualname__}, which the optimizer or scheduler calls, holds the old "
                f"{type(content).__name__} and would go on using it; remove it before, or pass the object that was "
                "wrapped, and set it again after"
            )


def _copy_dict(value: dict[Any, Any], copying: Copying) -> dict[Any, Any]:
    """A dict of the same kind; what was kept for a parameter is handed to its heirs."""
    made = copy.copy(value)
    made.clear()
    for key, entry in value.items():
        heirs = copying.heirs.get(id(key))
        if heirs is None:
            made[key] = copy_value(entry, copying)
            continue
        for heir in heirs:
            if heir.keeps is not None and (not heir.keeps or _has_channels(entry, key)):
                made[heir.parameter] = _inherited(entry, key, heir, copying)
    return made


def _has_channels(state: Any, parameter: Tensor) -> bool:
    """Whether every tensor in the state is a scalar or has the parameter's shape."""
    if isinstance(state, Tensor):
        return not state.dim() or state.shape == parameter.shape
    if isinstance(state, dict):
        return all(_has_channels(entry, parameter) for entry in state.values())
    # Tensors in a list are factors, one for each dimension; of a square weight they have its shape by accident.
    return not any(tensor.dim() for tensor in flat_tensors(state))


def _inherited(state: Any, old: Tensor, heir: Heir, copying: Copying) -> Any:
    def pick(tensor: Tensor) -> Tensor:
        return heir.inherit(tensor) if tensor.shape == old.shape else _clone(tensor)

    # Copied anew for each heir: several heirs of one parameter each need their state.
    made = copy_value(state, replace(copying, copies={}, tensor=pick))
    if isinstance(made, dict):
        for name in _COPIES_OF_WEIGHTS:
            if isinstance(made.get(name), Tensor):
                with torch.no_grad():
                    made[name] += heir.parameter - heir.inherit(old)  # a folded constant, else zero
    return made


def _copy_sequence(value: Any, copying: Copying) -> Any:
    """A container of the same kind, with the heirs of each parameter in its place."""
    items: list[Any] = []
    for item in value:
        heirs = copying.heirs.get(id(item))
        items.extend([copy_value(item, copying)] if heirs is None else [heir.parameter for heir in heirs])
    if isinstance(value, (tuple, set)):
        return type(value)(items)
    made = copy.copy(value)
    made.clear()
    made.extend(items)
    return made
