"""`find_groups`: which channels are coupled, which must stay and why, and a proof that the rest can be cut."""

from __future__ import annotations

import copy
import fnmatch
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsekit.complexity import layer_costs
from sparsekit.errors import InputError, ModelError, VerificationError
from sparsekit.graph import Coupling, Touch, is_depthwise, trace_couplings
from sparsekit.groups import ChannelGroup, ChannelGroups, LayerCost, Member, Role
from sparsekit.modes import evaluating, random_inputs
from sparsekit.plan import PrunePlan, make_plan
from sparsekit.surgery import apply_plan, compare_outputs, mask_model

# In float64 a correct cut agrees to about 1e-12 of the largest output; a wrong index is off by far more.
_PROOF_TOLERANCE = 1e-6
_FLOAT32_TOLERANCE = 1e-4


def find_groups(
    model: nn.Module, example_input: Tensor | tuple[Tensor, ...], *, ignore: Sequence[str] = ()
) -> ChannelGroups:
    """Find the coupled channels of a model that runs on `example_input`.

    Every group comes back; those that must stay whole say why in `frozen`: they reach the model's output, pass
    through something sparsekit cannot cut, match a name pattern of `ignore`, or failed the proof. The proof cuts
    half the channels of every free group of a copy with randomised norms, in float64, and compares it with the
    masked copy. The model keeps its mode, parameters and random state. Raises ModelError if the model does not
    run on the example, InputError for a pattern of `ignore` that matches no module.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    with torch.random.fork_rng():
        costs = _run_once(model, inputs)
        names = [name for name, _ in model.named_modules()]
        for pattern in ignore:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    f"ignore: the pattern {pattern!r} matches no module of {type(model).__name__}"
                )
        shared = _shared_tensors(model)
        formed = [_form_group(model, coupling, ignore, shared) for coupling in trace_couplings(model, inputs)]
        groups = ChannelGroups(
            groups=tuple(formed),
            input_shapes=tuple(tuple(x.shape) for x in inputs),
            layers=costs,
            tensor_shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
            parameters=tuple(name for name, _ in model.named_parameters()),
        )
        return _prove(model, _without_overlaps(groups))


def _run_once(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[LayerCost, ...]:
    try:
        return layer_costs(model, *inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on the example input of shape "
            f"{[tuple(x.shape) for x in inputs]}: {type(error).__name__}: {error}"
        ) from error


def _shared_tensors(model: nn.Module) -> set[str]:
    """Names of parameters that also go by another name (tied weights)."""
    by_identity: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity[id(parameter)].append(name)
    return {name for names in by_identity.values() if len(names) > 1 for name in names}


def _form_group(
    model: nn.Module, coupling: Coupling, ignore: Sequence[str], shared: set[str]
) -> ChannelGroup:
    modules, stored = dict(model.named_modules()), model.state_dict().keys()
    units = _units(coupling)
    n_channels = len(set(units.values()))
    members: list[Member] = []
    reason = coupling.obstacles[0] if coupling.obstacles else ""
    if len(coupling.obstacles) > 1:  # a transformer's residual stream has dozens, all alike
        reason += f" (and {len(coupling.obstacles) - 1} more such places)"
    for touch in coupling.touches:
        try:
            members += _members(touch, modules[touch.module], units, n_channels)
        except ValueError as error:
            reason = reason or f"{touch.module} {error}"
    ignored = [t.module for t in coupling.touches if t.side == "out" and _matches(t.module, ignore)]
    if ignored:
        reason = f"{ignored[0]} is on the ignore list"
    elif not any(touch.side == "in" for touch in coupling.touches):
        reason = "it reaches the model's output"
    elif tied := [member.tensor for member in members if member.tensor in shared]:
        reason = reason or f"{tied[0]} is shared between modules"
    elif computed := [member.tensor for member in members if member.tensor not in stored]:
        reason = reason or f"{computed[0]} is computed from other tensors (a parametrisation)"
    elif n_channels < 2:
        reason = reason or "its channels can only go together"
    return ChannelGroup(coupling.root, n_channels, tuple(members), reason)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether the module, or one that holds it, matches a pattern."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatch(prefix, pattern) for prefix in prefixes for pattern in patterns)


def _units(coupling: Coupling) -> dict[int, int]:
    """Number the things that can go on their own: root channels that meet in one position belong together."""
    parent: dict[int, int] = {}

    def find(channel: int) -> int:
        parent.setdefault(channel, channel)
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    for touch in coupling.touches:
        claimed: dict[int, int] = {}
        for channel, position in touch.pairs:
            other = claimed.setdefault(position, channel)
            low, high = sorted((find(channel), find(other)))
            parent[high] = low
    roots = sorted({find(channel) for channel in list(parent)})
    number = {root: unit for unit, root in enumerate(roots)}
    return {channel: number[find(channel)] for channel in parent}


def _members(touch: Touch, module: nn.Module, units: dict[int, int], n_channels: int) -> list[Member]:
    """One member for each tensor of the touched side; ValueError if channels own unequal numbers of positions."""
    owned: list[list[int]] = [[] for _ in range(n_channels)]
    for unit, position in sorted({(units[channel], position) for channel, position in touch.pairs}):
        owned[unit].append(position)
    repeat = len(owned[0])
    if repeat == 0 or any(len(positions) != repeat for positions in owned):
        raise ValueError("gives its channels unequal shares")
    positions = tuple(position for positions in owned for position in positions)
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    is_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    role: Role = "norm" if is_norm else "depthwise" if is_depthwise(module) else "producer"
    if touch.side == "in" and not is_norm:
        return [Member(f"{touch.module}.weight", 0 if transposed else 1, positions, repeat, "consumer")]
    # Before a BatchNorm a row's size means nothing, and a gate need not be zero to let zeros pass.
    penalised = is_norm or (touch.norm is None and not touch.gate)
    return [
        Member(
            f"{touch.module}.{name}",
            1 if transposed and role == "producer" and name == "weight" else 0,
            positions,
            repeat,
            role,
            penalised=penalised and name in ("weight", "bias"),
            norm=touch.norm,
        )
        for name in ("weight", "bias", "running_mean", "running_var")
        if isinstance(getattr(module, name, None), Tensor)
    ]


def _without_overlaps(groups: ChannelGroups) -> ChannelGroups:
    """Freeze groups that claim a position another free group has already: they would be cut twice."""
    taken: set[tuple[str, int, int]] = set()
    checked = []
    for group in groups:
        claims = {(m.tensor, m.dim, position) for m in group.members for position in m.positions}
        if not group.frozen and claims & taken:
            group = replace(group, frozen="it overlaps with another group")
        if not group.frozen:
            taken |= claims
        checked.append(group)
    return replace(groups, groups=tuple(checked))


def _prove(model: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    """Freeze every free group whose cut does not reproduce the masked model, found by bisection."""
    if not groups.free:
        return groups
    trial = _randomised(model, groups.input_shapes)
    failures: dict[str, str] = {}

    def search(names: list[str]) -> None:
        reason = _trial_cut(trial, groups, names)
        if reason and len(names) == 1:
            failures[names[0]] = f"a trial cut failed: {reason}"
        elif reason:
            search(names[: len(names) // 2])
            search(names[len(names) // 2 :])

    names = [group.name for group in groups.free]
    search(names)
    passed = [name for name in names if name not in failures]
    if failures and passed and (reason := _trial_cut(trial, groups, passed)):
        failures |= dict.fromkeys(passed, f"a trial cut of several groups together failed: {reason}")
    proved = [replace(g, frozen=failures[g.name]) if g.name in failures else g for g in groups]
    return replace(groups, groups=tuple(proved))


def _randomised(model: nn.Module, input_shapes: tuple[tuple[int, ...], ...]) -> nn.Module:
    """A copy whose norms and scales hide nothing: zero-initialised ones would make any cut look right.

    In float64, where a wrong index cannot pass for rounding, if the model runs in it; else as it is.
    """
    trial = copy.deepcopy(model).double()
    try:
        with evaluating(trial):
            trial(*random_inputs(input_shapes, 0, trial))
    except Exception:
        trial = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in trial.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
                centred = name.endswith(("bias", "running_mean"))
                tensor.copy_(0.2 * (noise - 0.5) if centred else 0.5 + noise)
    return trial


def _trial_cut(trial: nn.Module, groups: ChannelGroups, names: list[str]) -> str:
    """Cut half of each named group; an empty string if masked and cut agree, else what went wrong."""
    generator = torch.Generator().manual_seed(len(names))
    masks = {}
    for name in names:
        n = groups[name].n_channels
        masks[name] = torch.zeros(n, dtype=torch.bool)
        masks[name][torch.randperm(n, generator=generator)[: n - n // 2]] = True
    plan = make_plan(groups, masks)
    try:
        with evaluating(trial):
            cut = apply_plan(trial, plan)
            agreement = compare_outputs(mask_model(trial, plan), cut, plan.input_shapes, batches=(2,))
        if _trains(trial, plan):  # some models have branches that only training reaches
            cut.train()(*random_inputs(plan.input_shapes, 0, cut, batch=2))
    except VerificationError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    exact = next(trial.parameters()).dtype == torch.float64
    if not agreement.max_rel <= (_PROOF_TOLERANCE if exact else _FLOAT32_TOLERANCE):
        return f"the cut model's outputs are off by {agreement.max_rel:.2g} of the largest"
    return ""


def _trains(trial: nn.Module, plan: PrunePlan) -> bool:
    """Whether the uncut model runs in training mode on two inputs (a BatchNorm over one value does not)."""
    try:
        copy.deepcopy(trial).train()(*random_inputs(plan.input_shapes, 0, trial, batch=2))
    except Exception:
        return False
    return True
