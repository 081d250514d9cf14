"""An optimizer for the cut model: which parameter is whose heir, and what becomes of its state."""

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
# State that is a copy of the weights, not of gradients: Lookahead's slow weights, MADGRAD's first and ASGD's average.
_COPIES_OF_WEIGHTS = ("lookahead_slow_buff", "x0", "ax")
# What torch's schedulers mark their wrapper of `optimizer.step` with.
STEP_MARK = "_wrapped_by_lr_sched"


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


def find_heirs(model: nn.Module, pruned: nn.Module, plan: PrunePlan) -> _Heirs:
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


def check_held(optimizer: Optimizer, heirs: _Heirs) -> None:
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


def heir_names(group: Mapping[str, Any], heirs: _Heirs) -> list[str]:
    """The first to follow a parameter keeps the name its caller gave it."""
    return [
        name if heir.keeps is not None and index == 0 else heir.name
        for parameter, name in zip(group["params"], group["param_names"], strict=True)
        for index, heir in enumerate(heirs[id(parameter)])
    ]


def check_complete(old: Optimizer, new: Optimizer, heirs: _Heirs) -> None:
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


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@dataclass(frozen=True)
class Move:
    """One act of copying: heirs of parameters, copies made so far by the id of the original, and how a tensor is
    copied.
    """

    heirs: _Heirs
    copies: dict[int, Any] = field(default_factory=dict)
    tensor: Callable[[Tensor], Tensor] = _clone


def copied_optimizer(value: Any, move: Move) -> Any:
    """A copy that shares no state: optimizers, schedulers, containers, tensors and random generators are copied,
    parameters replaced by their heirs, methods bound to the copy of their object; all else is shared.
    """
    if id(value) in move.copies:
        return move.copies[id(value)]
    if isinstance(value, (Optimizer, LRScheduler)):
        return copied_object(value, move)
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


def copied_object(old: Any, move: Move) -> Any:
    """A new object of the same class with copies of all attributes; its constructor is not called."""
    new = object.__new__(type(old))
    move.copies[id(old)] = new
    for name, value in vars(old).items():
        if name == "step" and hasattr(value, STEP_MARK):
            continue  # it steps the old optimizer; rebind_scheduler makes another
        new.__dict__[name] = copied_optimizer(value, move)
    return new


def _check_free(function: types.FunctionType, move: Move) -> None:
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


def _copied_sequence(value: Any, move: Move) -> Any:
    """The same kind of container; a parameter makes place for all its heirs."""
    items: list[Any] = []
    for item in value:
        heirs = move.heirs.get(id(item))
        items.extend([copied_optimizer(item, move)] if heirs is None else [heir.parameter for heir in heirs])
    if isinstance(value, (tuple, set)):
        return type(value)(items)
    made = copy.copy(value)
    made.clear()
    made.extend(items)
    return made


def _copied_dict(value: dict[Any, Any], move: Move) -> dict[Any, Any]:
    """The same kind of dict; what was kept for a parameter is handed to its heirs."""
    made = copy.copy(value)
    made.clear()
    for key, entry in value.items():
        heirs = move.heirs.get(id(key))
        if heirs is None:
            made[key] = copied_optimizer(entry, move)
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


def _inherited(state: Any, old: Tensor, heir: _Heir, move: Move) -> Any:
    def pick(tensor: Tensor) -> Tensor:
        return heir.inherit(tensor) if tensor.shape == old.shape else _clone(tensor)

    # With copies of its own: several heirs of one parameter each need their state.
    made = copied_optimizer(state, replace(move, copies={}, tensor=pick))
    if isinstance(made, dict):
        for name in _COPIES_OF_WEIGHTS:
            if isinstance(made.get(name), Tensor):
                with torch.no_grad():
                    made[name] += heir.parameter - heir.inherit(old)  # a folded constant, else zero
    return made


def prepare_new_parameters_(optimizer: Optimizer) -> None:
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
