"""Residual blocks that can go as a whole: they return their input once their layer scales are zero.

A block x + scale * f(x) with a learned vector `scale` (Touvron et al., "Going deeper with image transformers", 2021)
is the identity where the vector is zero, whatever f is. So nothing has to be made up for, layer norms included. Such
blocks are found by trial, not by name: each module of a randomised copy that has vectors of its own is run on what it
reads in the model, with these vectors at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.coupling.proof import Trial, fits_in_double, randomised
from sparsekit.evaluation import evaluating, random_inputs
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member, Role

# What a module is called with: by position and by name.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def find_blocks(model: nn.Module, groups: ChannelGroups) -> tuple[ChannelGroup, ...]:
    """Find such blocks: a group of one channel for each, in model order, frozen where a trial cut of the model fails.

    The penalised members are the scales; all else that the block owns goes with them.
    """
    trial_model = randomised(model, groups.input_shapes, exact=fits_in_double(groups))
    _wake_(trial_model)
    found = tuple(
        _group(trial_model, name, scales)
        for name, scales in _identities(trial_model, groups.input_shapes).items()
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


def _group(model: nn.Module, block: str, scales: Sequence[str]) -> ChannelGroup:
    own = {id(module) for module in model.get_submodule(block).modules()}
    shared = {
        id(parameter)
        for module in model.modules()
        if id(module) not in own
        for parameter in module._parameters.values()
    }

    def whole(tensor: Tensor, name: str) -> Member:
        # A scale of shape (channels, 1, 1) lies along its longest dimension.
        dim = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
        size = tensor.shape[dim]
        scale = name in scales
        role: Role = "parameter" if scale else "inside"
        return Member(name, dim, tuple(range(size)), size, role, penalised=scale)

    members = tuple(
        whole(parameter, name)
        for name, parameter in model.named_parameters()
        if name.startswith(f"{block}.") and parameter.dim() and id(parameter) not in shared
    )
    return ChannelGroup(block, 1, members, bypass=block)


def _identities(model: nn.Module, input_shapes: tuple[tuple[int, ...], ...]) -> dict[str, list[str]]:
    """The smallest modules that return their input when some of their vectors are zero, with these vectors' names."""
    vectors = {name: parameter for name, parameter in model.named_parameters() if _may_scale(name, parameter)}
    holders = {name.rsplit(".", up)[0] for name in vectors for up in range(1, name.count(".") + 1)}
    modules = {name: module for name, module in model.named_modules() if name in holders}
    recorded = _recorded_arguments(model, modules, input_shapes)
    found: dict[str, list[str]] = {}
    for name in sorted(recorded, key=lambda n: -n.count(".")):
        if any(inner.startswith(f"{name}.") for inner in found):
            continue
        inside = [vector for vector in vectors if vector.startswith(f"{name}.")]
        args, keywords = recorded[name]
        if not _is_identity(modules[name], [vectors[v] for v in inside], args, keywords):
            continue
        needed = list(inside)
        for vector in inside:  # what need not be zero is no scale
            fewer = [other for other in needed if other != vector]
            if _is_identity(modules[name], [vectors[v] for v in fewer], args, keywords):
                needed = fewer
        if needed:
            found[name] = needed
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _may_scale(name: str, parameter: nn.Parameter) -> bool:
    """A learned vector that is neither the weight nor the bias of a layer or norm."""
    is_vector = parameter.dim() > 0 and parameter.numel() == max(parameter.shape) > 1
    return is_vector and name.rpartition(".")[2] not in ("weight", "bias")


def _recorded_arguments(
    model: nn.Module, modules: dict[str, nn.Module], input_shapes: tuple[tuple[int, ...], ...]
) -> dict[str, _Arguments]:
    """The arguments of each module that a pass calls once and whose output has the shape of its first argument."""
    calls: dict[str, list[_Arguments]] = {}
    alike: set[str] = set()

    def before(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            kept = tuple(one.clone() if isinstance(one, Tensor) else one for one in args)
            calls.setdefault(name, []).append((kept, dict(keywords)))

        return note

    def after(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = args[0] if args else None
            if isinstance(first, Tensor) and isinstance(output, Tensor) and first.shape == output.shape:
                alike.add(name)

        return note

    handles = [m.register_forward_pre_hook(before(name), with_kwargs=True) for name, m in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        with evaluating(model):
            model(*random_inputs(input_shapes, 0, model))
    finally:
        for handle in handles:
            handle.remove()
    return {name: own[0] for name, own in calls.items() if len(own) == 1 and name in alike}


def _is_identity(
    module: nn.Module, scales: Sequence[nn.Parameter], args: tuple[Any, ...], keywords: dict[str, Any]
) -> bool:
    """Whether the module returns its first argument, to the bit, while the scales are zero."""
    before = [scale.detach().clone() for scale in scales]
    given = tuple(one.clone() if isinstance(one, Tensor) else one for one in args)
    with evaluating(module):
        for scale in scales:
            scale.zero_()
        try:
            return torch.equal(module(*given, **keywords), args[0])
        finally:
            for scale, values in zip(scales, before, strict=True):
                scale.copy_(values)
