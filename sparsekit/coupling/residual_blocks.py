"""Residual blocks that can go as a whole: they return their input once their layer scales or last layers are zero.

A block x + scale * f(x) with a learned vector `scale` (Touvron et al., "Going deeper with image transformers", 2021)
is the identity where the vector is zero, whatever f is. So nothing has to be made up for, layer norms included. A block
x + f(x) without such a vector is the identity where the last layer of f is zero, weight and bias; relu(x + f(x)) is
where x comes out of a ReLU.

Such blocks are found by trial, not by name: each module of a randomised copy that holds vectors or layers is run on
what it reads in the model, with these at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.coupling.proof import Trial, fits_in_double, randomised
from sparsekit.evaluation import evaluating
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member, Role
from sparsekit.structure.inputs import InputSpec

# What a module is called with: by position and by name.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# What is zero together: the name of a vector, or of all parameters of a layer.
_Unit = tuple[str, ...]


def find_blocks(model: nn.Module, groups: ChannelGroups, *, plain: bool = False) -> tuple[ChannelGroup, ...]:
    """Find such blocks: a group of one channel for each, in model order, frozen where a trial cut of the model fails.

    The penalised members are the scales; all else that the block owns goes with them. With `plain` blocks come too that
    have more or other things than scales to be zero: members of role "silenced", of which none is penalised.
    """
    trial_model = randomised(model, groups.inputs, exact=fits_in_double(groups))
    _wake_(trial_model)
    scaled = _scaled_blocks(trial_model, groups.inputs)
    others = _plain_blocks(trial_model, groups.inputs, scaled) if plain else {}
    found = tuple(
        _group(trial_model, name, scaled.get(name, ()), others.get(name, ()))
        for name, _ in trial_model.named_modules()
        if name in scaled or name in others
    )
    if not found:
        return ()
    trial = Trial(trial_model, replace(groups, groups=found))
    failures = trial.search(trial.cut)
    passed = [group.name for group in found if group.name not in failures]
    if passed:
        failures |= trial.search(trial.cut_and_train, passed)
    return tuple(replace(group, frozen=failures.get(group.name, "")) for group in found)


def _wake_(model: nn.Module) -> None:
    """Leave no parameter at zero, in place: the trial would not miss a branch that happens to be silent now."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _may_scale(name, parameter) or not parameter.any():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.5 + noise)


def _group(model: nn.Module, block: str, scales: Collection[str], silenced: Collection[str]) -> ChannelGroup:
    shared = _held_outside(model, model.get_submodule(block))

    def whole(tensor: Tensor, name: str) -> Member:
        # A scale of shape (channels, 1, 1) lies along its longest dimension.
        dim = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
        size = tensor.shape[dim]
        scale = name in scales
        role: Role = "parameter" if scale else "silenced" if name in silenced else "inside"
        return Member(name, dim, tuple(range(size)), size, role, penalised=scale)

    members = tuple(
        whole(parameter, name)
        for name, parameter in model.named_parameters()
        if name.startswith(f"{block}.") and parameter.dim() and id(parameter) not in shared
    )
    return ChannelGroup(block, 1, members, bypass=block)


def _held_outside(model: nn.Module, block: nn.Module) -> set[int]:
    """The parameters, by id, that the model still holds without the block."""
    held: set[int] = set()
    seen = {id(block)}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            held.update(id(parameter) for parameter in module._parameters.values())
            waiting.extend(module.children())
    return held


def _scaled_blocks(model: nn.Module, inputs: InputSpec) -> dict[str, list[str]]:
    """The smallest modules that return their input when some of their vectors are zero, with these vectors' names."""
    vectors = [(name,) for name, parameter in model.named_parameters() if _may_scale(name, parameter)]
    holders = {name.rsplit(".", up)[0] for (name,) in vectors for up in range(1, name.count(".") + 1)}
    modules = {name: module for name, module in model.named_modules() if name in holders}
    return _identities(model, modules, vectors, inputs, shared=True)


def _plain_blocks(model: nn.Module, inputs: InputSpec, scaled: Collection[str]) -> dict[str, list[str]]:
    """The smallest modules, apart from `scaled` ones, that return their input when some of their layers are zero.

    With the names of these layers' parameters. Vectors may be zero, too.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [
        tuple(names[id(own)] for own in module.parameters())
        for module in model.modules()
        if _is_layer(module)
    ]
    known = {name for unit in layers for name in unit}
    vectors = [
        (name,)
        for name, parameter in model.named_parameters()
        if _may_scale(name, parameter) and name not in known
    ]
    modules = {
        name: module
        for name, module in model.named_modules()
        if name
        and any(module.children())
        and not _is_layer(module)
        and not any(_nested(name, other) for other in scaled)
    }
    # Layers first: where a vector does as well as a layer, the vector is the one that stays to be zero.
    return _identities(model, modules, [*layers, *vectors], inputs, shared=False)


def _is_layer(module: nn.Module) -> bool:
    """Whether all parameters of a module are its own. It may hold modules without any, such as a norm's activation."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return 0 < len(own) == len(list(module.parameters())) and all(parameter.dim() for parameter in own)


def _nested(one: str, other: str) -> bool:
    """Whether one of two modules is, or lies in, the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _identities(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    units: Sequence[_Unit],
    inputs: InputSpec,
    *,
    shared: bool,
) -> dict[str, list[str]]:
    """The smallest of the modules that return their input when some units inside are zero, with the names in these.

    `shared`: units that other modules hold as well may be among them.
    """
    if not modules:
        return {}
    parameters = dict(model.named_parameters())
    recorded = _recorded_arguments(model, modules, inputs)
    found: dict[str, list[str]] = {}
    for name in sorted(recorded, key=lambda n: -n.count(".")):
        if any(inner.startswith(f"{name}.") for inner in found):
            continue
        outside = set() if shared else _held_outside(model, modules[name])
        inside = {
            unit: [parameters[n] for n in unit]
            for unit in units
            if all(n.startswith(f"{name}.") and id(parameters[n]) not in outside for n in unit)
        }
        needed = _needed(modules[name], inside, *recorded[name]) if inside else []
        if needed:
            found[name] = list(dict.fromkeys(n for unit in needed for n in unit))
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _needed(
    module: nn.Module,
    units: Mapping[_Unit, Sequence[nn.Parameter]],
    args: tuple[Any, ...],
    keywords: dict[str, Any],
) -> list[_Unit]:
    """The fewest units that have to be zero for the module to return its input, the last preferred; else none."""

    def silent(zero: list[_Unit]) -> bool:
        tensors = {id(tensor): tensor for unit in zero for tensor in units[unit]}
        return _is_identity(module, list(tensors.values()), args, keywords)

    needed = list(units)
    if silent(needed[-1:]):  # so it is with most: the last layer or norm of the only branch
        return needed[-1:]
    if not silent(needed):
        return []
    for unit in units:  # what need not be zero ends no branch
        fewer = [other for other in needed if other != unit]
        if silent(fewer):
            needed = fewer
    return needed


def _may_scale(name: str, parameter: nn.Parameter) -> bool:
    """A learned vector that is neither the weight nor the bias of a layer or norm."""
    is_vector = parameter.dim() > 0 and parameter.numel() == max(parameter.shape) > 1
    return is_vector and name.rpartition(".")[2] not in ("weight", "bias")


def _recorded_arguments(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: InputSpec
) -> dict[str, _Arguments]:
    """The arguments of each module that a pass calls once and whose output has the shape of its first argument."""
    calls: dict[str, _Arguments | None] = {}

    def before(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            kept = tuple(one.clone() if isinstance(one, Tensor) else one for one in args)
            calls[name] = None if name in calls else (kept, dict(keywords))

        return note

    def after(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = args[0] if args else None
            alike = isinstance(first, Tensor) and isinstance(output, Tensor) and first.shape == output.shape
            if not alike:
                calls[name] = None

        return note

    handles = [m.register_forward_pre_hook(before(name), with_kwargs=True) for name, m in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        with evaluating(model):
            inputs.draw(0, model).call(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: arguments for name, arguments in calls.items() if arguments is not None}


def _is_identity(
    module: nn.Module, zero: Sequence[nn.Parameter], args: tuple[Any, ...], keywords: dict[str, Any]
) -> bool:
    """Whether the module returns its first argument, to the bit, while these parameters are zero."""
    before = [parameter.detach().clone() for parameter in zero]
    given = tuple(one.clone() if isinstance(one, Tensor) else one for one in args)
    with evaluating(module):
        for parameter in zero:
            parameter.zero_()
        try:
            return torch.equal(module(*given, **keywords), args[0])
        except Exception:  # the module ran on these arguments: it cannot do with the zeros
            return False
        finally:
            for parameter, values in zip(zero, before, strict=True):
                parameter.copy_(values)
