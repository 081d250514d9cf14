"""Torch-Pruning: its importance criteria on our groups, and its pruning histories as our plans and back.

Torch-Pruning is Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, https://github.com/VainF/Torch-Pruning.
All statements about it are on version 1.6. It is imported when it is first needed.

The criteria of `importance` by name. All but the first are Torch-Pruning's objects with their defaults:

- "magnitude": ours (`output_shares`), the channel's share of its layers' outputs, in MACs
- "group_magnitude": squared weights (Fang et al., 2023)
- "bn_scale": |scale| of the BatchNorms (Liu et al., "Learning Efficient Convolutional Networks through Network
  Slimming", 2017)
- "lamp": squared weights over those of all channels at least as large (Lee et al., "Layer-Adaptive Sparsity for the
  Magnitude-based Pruning", 2021)
- "fpgm": distances to the other filters of the layer (He et al., "Filter Pruning via Geometric Median", 2019)
- "taylor": |weight x gradient| (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019)
- "hessian": weight^2 x mean squared gradient of single images (LeCun et al., "Optimal Brain Damage", 1990)
- "random": uniform in [0, 1)
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.errors import InputError, first_line
from sparsekit.evaluation import Arguments, copied, eval_mode
from sparsekit.options import Importance
from sparsekit.selection.importance import output_shares
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Role
from sparsekit.structure.masks import Scores
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.mask import detached
from sparsekit.surgery.verify import agreement, outputs

__all__ = ["PruningHistory", "from_pruning_history", "importance", "to_pruning_history"]

# What `DependencyGraph.pruning_history()` returns: name of a layer, whether its output side is pruned, indices.
PruningHistory = list[tuple[str, bool, list[int]]]
Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Any, Tensor], Tensor]
Side = Literal["out", "in"]
# For each layer and side, the positions there of each channel of a group, ascending.
Positions = dict[tuple[str, Side], list[list[int]]]

_CRITERIA: Mapping[str, str] = {
    "group_magnitude": "GroupMagnitudeImportance",
    "bn_scale": "BNScaleImportance",
    "lamp": "LAMPImportance",
    "fpgm": "FPGMImportance",
    "taylor": "GroupTaylorImportance",
    "hessian": "GroupHessianImportance",
    "random": "RandomImportance",
}
# The roles that are a side of a layer in Torch-Pruning. First come layers that make the channels.
_SIDES: dict[Role, Side] = {
    "producer": "out",
    "depthwise": "out",
    "norm": "out",
    "layer_norm": "out",
    "consumer": "in",
}
_OF_LAYERS = ("weight", "bias", "running_mean", "running_var")
# Both models are cut from the same numbers, in the precision of the model.
_TOLERANCE = 1e-4


# ------------------------------------------------------------------------------------------------- importance


def importance(
    model: nn.Module,
    groups: ChannelGroups,
    criterion: Importance | Callable[[Any], Tensor | None],
    *,
    batches: Batches | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Scores:
    """Compute the importance of every channel of the free groups, by our criterion or one of Torch-Pruning.

    Returns (n_channels,) for each free group: float64 on the CPU, >= 0 and finite. A group that the criterion cannot
    rank gets `math.inf` throughout and so stays whole: a residual block, channels that no convolution or linear layer
    makes, and a group without what the criterion reads ("bn_scale" without a BatchNorm).

    `criterion` is a name (see this module), or any object that is called with a `torch_pruning.Group`. Torch-Pruning
    adds up a channel's weights in each layer of the group, averages over layers, and divides by the group's mean
    ("lamp" and "random" do not). So groups compare as under its `global_pruning=True`. A group that is zero throughout
    gets 0. A unit, such as a head, gets the mean over its channels.

    "taylor", "hessian" and objects of these classes need `batches` of (images, labels). The gradients of
    `loss(model(images), labels)`, by default the cross entropy, are computed on a copy in eval mode and averaged over
    batches; for "hessian" they are squared and averaged over images. Neither the model nor the global random state
    changes. `seed` is for objects that draw numbers on the CPU.

    Raises InputError for an unknown criterion, one that needs batches and got none, groups of another model, or numbers
    that are negative, not finite, or not one for each channel.
    """
    _check_fits(model, groups)
    if criterion == "magnitude":
        return output_shares(model, groups)
    criterion = _their_criterion(criterion)
    if _needs_gradients(criterion):
        model = _with_gradients(model, criterion, batches, loss or F.cross_entropy)
        criterion = _without_gradients_of_its_own(criterion)
    modules = dict(model.named_modules())
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(seed)
        return {group.name: _ranked(group, modules, criterion) for group in groups.free}


def to_pruning_history(model: nn.Module, plan: PrunePlan, groups: ChannelGroups) -> PruningHistory:
    """Turn a plan into the pruning history with which Torch-Pruning makes the same cut.

    `DependencyGraph().build_dependency(copy, example).load_pruning_history(history)` cuts a copy of the dense `model`
    to the shapes of `apply_plan(model, plan)`. There is one entry for each group that loses channels, at the first
    layer that makes them: (name of the layer, whether its output side is pruned, indices in what the entries before
    leave).

    The history is tried on a copy, whose tensors, and outputs on a random input, have to be those of the plan. One
    difference remains: `apply_plan` folds the constants of dead channels into biases, Torch-Pruning drops them.

    Raises InputError for a plan of other groups or of another model, for one that takes out residual blocks, and where
    Torch-Pruning would make another cut: it couples channels in another way (units of grouped convolutions), unties
    weights, or leaves sizes in the model's code and attributes as they were (numbers of heads).
    """
    _check_fits(model, groups)
    if plan.blocks:
        raise InputError(
            f"the plan takes out the block {plan.blocks[0].module}, and torch_pruning cuts channels only; make one "
            "from groups without whole blocks"
        )
    masks = _masks(plan, groups)
    if make_plan(groups, masks).cuts != plan.cuts:
        raise InputError(
            "the plan cuts other tensors than its groups do; give the groups that it was made from"
        )
    history: PruningHistory = []
    done: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if not bool(mask.all()):
            history.append(_entry(groups, groups[name], mask, done))
            done[name] = mask
    if history:
        _check_agrees(model, plan, groups, history)
    return history


def from_pruning_history(groups: ChannelGroups, history: Iterable[Sequence[Any]]) -> PrunePlan:
    """Turn a pruning history of Torch-Pruning into a plan for the dense model of `groups`.

    `history` is what `pruner.pruning_history()` returns: entries (name of a layer, whether its output side is pruned,
    indices). Indices count what the entries before have left of that side. Entries of one layer, or of several layers
    of one group, add up. An entry of an input side (False) drops the channels that it reads; after a flatten one column
    of a channel stands for all of them.

    If Torch-Pruning couples other channels than sparsekit, the shapes of its model and of `apply_plan`'s differ.

    Raises InputError for an entry that is no such triple, names a layer whose channels are in no group or a frozen one,
    has indices out of range, splits a unit (a head, a group of a grouped convolution), or leaves a group nothing.
    """
    masks: dict[str, Tensor] = {}
    for number, entry in enumerate(history):
        _drop_(masks, groups, *_read(number, entry))
    return make_plan(groups, masks)


# ------------------------------------------------------------------------------------------------- importance


def _their_criterion(criterion: Any) -> Any:
    """Return Torch-Pruning's object of that name, or the caller's own object."""
    if isinstance(criterion, str) and criterion in _CRITERIA:
        return getattr(_torch_pruning().importance, _CRITERIA[criterion])()
    if callable(criterion) and not isinstance(criterion, type):
        return criterion
    found = f"the class {criterion.__name__}; call it" if isinstance(criterion, type) else repr(criterion)
    raise InputError(
        f"criterion must be one of {', '.join([*_CRITERIA, 'magnitude'])}, or an importance object of torch_pruning, "
        f"got {found}"
    )


def _ranked(group: ChannelGroup, modules: Mapping[str, nn.Module], criterion: Any) -> Tensor:
    """Return what the object says of each channel of a group; infinite if it says nothing.

    It gives one number for each channel of the first layer that it looks at. Layers are sorted, the narrowest first;
    root channels are those of the narrowest that it looks at.
    """
    layers = _layers(group, modules)
    shape = None
    for width in sorted({len(own[0]) for own in layers.values()}):
        found = _called(criterion, _their_group(layers, modules, width), group.name)
        if found is None:
            break
        shape = tuple(found.shape)
        if shape == (group.n_channels * width,):
            return _checked_numbers(found.double().cpu().reshape(-1, width).mean(1), group, criterion)
    if shape is not None:
        raise InputError(
            f"{type(criterion).__name__} gives numbers of shape {shape} for the {group.n_channels} channels of "
            f"{group.name}; an importance object has to give one for each channel of the first layer that it looks at"
        )
    return torch.full((group.n_channels,), torch.inf, dtype=torch.float64)


def _layers(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> Positions:
    """Return positions as Torch-Pruning counts them, in the layers that it knows, the narrowest layer first."""
    found = {}
    for (name, side), own in _positions(group).items():
        if _pruning_function(modules[name], side) is not None:
            found[name, side] = _in_all_conv_groups(modules[name], own) if side == "in" else own
    makes = {member.module for member in (*group.of_role("producer"), *group.of_role("depthwise"))}
    if group.bypass or not any(name in makes for name, side in found if side == "out"):
        return {}
    return dict(sorted(found.items(), key=lambda layer: len(layer[1][0])))


def _in_all_conv_groups(module: nn.Module, own: list[list[int]]) -> list[list[int]]:
    """Repeat the columns of a grouped convolution for each of its conv_groups: Torch-Pruning counts input channels."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or module.groups == 1:
        return own
    width = module.in_channels // module.groups
    return [[column + i * width for i in range(module.groups) for column in one] for one in own]


def _called(criterion: Any, theirs: Any, name: str) -> Tensor | None:
    """Call the object with a group; zeros where it divided zeros by their mean."""
    try:
        found: Tensor | None = criterion(theirs)
        if found is None or not bool(found.isnan().all()) or getattr(criterion, "normalizer", None) is None:
            return found
        plain = copy.copy(criterion)
        plain.normalizer = None
        return torch.zeros_like(found) if not bool(plain(theirs).any()) else found
    except Exception as error:
        raise InputError(
            f"{type(criterion).__name__} cannot rank the channels of {name}: {first_line(error)}; "
            "rank by another criterion"
        ) from error


def _their_group(layers: Positions, modules: Mapping[str, nn.Module], width: int) -> Any:
    """Make a `torch_pruning.Group` of these layers with all channels, each of `width` root channels.

    The indices of an item ascend, because "taylor" and "hessian" sort them but not the root indices.
    """
    from torch_pruning.dependency import Dependency, Group, Node

    nodes = {name: Node(modules[name], None, name) for name, _ in layers}
    (first, first_side), _ = next(iter(layers.items()))
    trigger = _pruning_function(modules[first], first_side)
    theirs = Group()
    for (name, side), own in layers.items():
        roots = _roots(side, len(own[0]), width)
        pairs = sorted(
            (p, c * width + root) for c, one in enumerate(own) for p, root in zip(one, roots, strict=True)
        )
        handler = _pruning_function(modules[name], side)
        theirs.add_dep(Dependency(trigger, handler, nodes[first], nodes[name]), [p for p, _ in pairs])
        theirs[-1].root_idxs = [root for _, root in pairs]
    return theirs


def _pruning_function(module: nn.Module, side: Side) -> Any:
    """Return the function with which Torch-Pruning prunes this side of a layer; None if it does not know the layer."""
    from torch_pruning.ops import module2type
    from torch_pruning.pruner.function import PrunerBox

    pruner = PrunerBox.get(module2type(module))
    if pruner is None:
        return None
    return pruner.prune_out_channels if side == "out" else pruner.prune_in_channels


def _checked_numbers(ranked: Tensor, group: ChannelGroup, criterion: Any) -> Tensor:
    if not bool((ranked.isfinite() & (ranked >= 0)).all()):
        raise InputError(
            f"{type(criterion).__name__} gives {ranked.min():.3g} for a channel of {group.name}, and importance must "
            "be finite and >= 0; look for weights or gradients that are not finite, or choose another normalizer"
        )
    return ranked


# -------------------------------------------------------------------------------------------------- gradients


def _needs_gradients(criterion: Any) -> bool:
    theirs = _torch_pruning().importance
    return isinstance(criterion, (theirs.GroupTaylorImportance, theirs.GroupHessianImportance))


def _with_gradients(model: nn.Module, criterion: Any, batches: Batches | None, loss: Loss) -> nn.Module:
    """Return a copy whose parameters have the gradients that the object reads: means, or mean squares over images."""
    name, alone = type(criterion).__name__, _of_single_images(criterion)
    if batches is None:
        raise InputError(
            f"{name} ranks by gradients and needs images to compute them; got batches=None, give batches of "
            "(images, labels), for example a loader"
        )
    read = copied(model)
    parameters = [p.requires_grad_() for p in read.parameters() if p.is_floating_point()]
    sums, n = [torch.zeros_like(p) for p in parameters], 0
    with torch.random.fork_rng(), eval_mode(read), torch.enable_grad():
        for images, labels in _pairs(batches, parameters[0].device, alone=alone):
            value = _checked_loss(loss(read(images), labels))
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.square() if alone else gradient
            n += 1
    if n == 0:
        raise InputError(
            f"{name} ranks by gradients, and batches has none; a generator can be read only once"
        )
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = total / n
    return read


def _pairs(batches: Batches, device: torch.device, *, alone: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels on the device, by batches or one by one (`alone`)."""
    for batch in batches:
        pair = tuple(batch) if isinstance(batch, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(one, Tensor) for one in pair):
            raise InputError(
                f"batches must give pairs (images, labels) of tensors, got {type(batch).__name__}"
                + (f" of {', '.join(type(one).__name__ for one in pair)}" if pair else "")
            )
        images, labels = (one.to(device) for one in pair)
        if alone:
            yield from ((images[i : i + 1], labels[i : i + 1]) for i in range(len(images)))
        else:
            yield images, labels


def _checked_loss(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"loss must return one number for a batch, got {found}; take the mean over the images"
        )
    return value.reshape(())


def _without_gradients_of_its_own(criterion: Any) -> Any:
    """Copy the object without the gradients that the caller accumulated in it."""
    fresh = copy.copy(criterion)
    if _of_single_images(fresh):
        fresh.zero_grad()
    return fresh


def _of_single_images(criterion: Any) -> bool:
    return isinstance(criterion, _torch_pruning().importance.GroupHessianImportance)


# -------------------------------------------------------------------------------------------------- histories


def _masks(plan: PrunePlan, groups: ChannelGroups) -> dict[str, Tensor]:
    """Return the keep-masks that a plan was made of."""
    sizes = {group.name: group.n_channels for group in groups}
    masks = {}
    for cut in plan.groups:
        if sizes.get(cut.name) != cut.n_channels:
            raise InputError(
                f"the plan has a group {cut.name} of {cut.n_channels} channels, the groups have "
                f"{sizes.get(cut.name, 'none of that name')}; give the groups that it was made from"
            )
        masks[cut.name] = torch.zeros(cut.n_channels, dtype=torch.bool)
        masks[cut.name][list(cut.kept)] = True
    return masks


def _entry(
    groups: ChannelGroups, group: ChannelGroup, mask: Tensor, done: Mapping[str, Tensor]
) -> tuple[str, bool, list[int]]:
    """Return the entry of one group, to come after those of the groups that are `done`."""
    makes = {m.module for m in (*group.of_role("producer"), *group.of_role("depthwise"))}
    owned = {name: own for (name, side), own in _positions(group).items() if side == "out" and name in makes}
    for name, own in owned.items():
        side = _side_of(groups, name, "out")
        if side is not None and name:
            place = {position: i for i, position in enumerate(side.left(done))}
            return name, True, sorted(place[p] for c, one in enumerate(own) if not mask[c] for p in one)
    raise InputError(
        f"the channels of {group.name} are made by no layer that torch_pruning can name; leave the group whole"
    )


def _check_agrees(model: nn.Module, plan: PrunePlan, groups: ChannelGroups, history: PruningHistory) -> None:
    """Raise InputError if Torch-Pruning makes another model by this history than the plan."""
    theirs = _cut_by_torch_pruning(model, groups, history)
    found = theirs.state_dict()
    for name, expected in _cut_tensors(model, plan).items():
        if found[name].shape != expected.shape:
            raise InputError(
                f"torch_pruning cuts {name} to {tuple(found[name].shape)} by this history, the plan to "
                f"{tuple(expected.shape)}: it couples the channels another way; cut with sparsekit.apply_plan"
            )
        if not torch.equal(found[name], expected):
            raise InputError(
                f"torch_pruning keeps other channels of {name} by this history than the plan: it couples them another "
                "way; cut with sparsekit.apply_plan"
            )
    inputs = groups.inputs.draw(0, model)
    expected_outputs = outputs(detached(model, plan), inputs)
    try:
        difference = agreement(expected_outputs, outputs(theirs, inputs)).max_rel
    except Exception as error:
        raise InputError(
            f"the model that torch_pruning cuts does not run: {first_line(error)}; it leaves sizes in the model's code "
            "and attributes as they were, sparsekit.apply_plan does not"
        ) from error
    if not difference <= _TOLERANCE:
        raise InputError(
            f"the model that torch_pruning cuts differs from the plan's by {difference:.2g} of the "
            "largest output: it does not adjust a norm or a standardised filter; cut with sparsekit.apply_plan"
        )


def _cut_by_torch_pruning(model: nn.Module, groups: ChannelGroups, history: PruningHistory) -> nn.Module:
    """Return a copy of the model that Torch-Pruning has cut by this history."""
    theirs = copied(model)
    for parameter in theirs.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # it traces by autograd
    inputs = groups.inputs.draw(0, theirs)
    graph = _torch_pruning().DependencyGraph()
    try:
        with torch.random.fork_rng(), torch.enable_grad(), _quiet():
            graph.build_dependency(theirs, example_inputs=_as_theirs(inputs), verbose=False)
            graph.load_pruning_history([(name, is_out, list(indices)) for name, is_out, indices in history])
    except Exception as error:
        raise InputError(
            f"torch_pruning cannot cut {type(model).__name__}: {first_line(error)}; cut with sparsekit.apply_plan"
        ) from error
    return theirs


def _as_theirs(inputs: Arguments) -> tuple[Any, ...] | dict[str, Any]:
    """Arguments as Torch-Pruning takes them: all by position, or all by name."""
    return dict(inputs.keyword) if inputs.keyword else inputs.positional


def _cut_tensors(model: nn.Module, plan: PrunePlan) -> dict[str, Tensor]:
    """Return the tensors of the model without the positions that the plan drops; nothing is folded."""
    tensors = model.state_dict()
    for cut in plan.cuts:
        if cut.role != "size":
            tensor = tensors[cut.tensor]
            tensors[cut.tensor] = tensor.index_select(cut.dim, torch.tensor(cut.keep, device=tensor.device))
    return tensors


def _read(number: int, entry: Sequence[Any]) -> tuple[str, str, Side, list[int]]:
    """Read an entry: (words for its place in the history, layer, side, indices)."""
    where = f"entry {number} of the pruning history"
    try:
        module, is_out, indices = entry
        found = [operator.index(i) for i in (indices if hasattr(indices, "__iter__") else [indices])]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where} must be (name of a layer, whether its output side is pruned, indices), got {entry!r:.80}"
        ) from error
    return f"{where} ({module})", str(module), "out" if is_out else "in", found


def _drop_(
    masks: dict[str, Tensor],
    groups: ChannelGroups,
    where: str,
    module: str,
    side: Side,
    indices: Sequence[int],
) -> None:
    """Drop from the keep-masks what an entry drops, in place."""
    layer = _side_of(groups, module, side)
    if layer is None:
        raise InputError(
            f"{where}: no group has channels of its {side}put side; known are the layers of find_groups' groups"
        )
    left = layer.left(masks)
    if wrong := [i for i in indices if not 0 <= i < len(left)]:
        raise InputError(
            f"{where} has the index {wrong[0]}, and its {side}put side has {len(left)} positions left; indices count "
            "what the entries before leave (Group.prune(idxs) of torch_pruning 1.6 notes down a second, wrong entry)"
        )
    for name, channels in _by_channel(layer, {left[i] for i in indices}, where).items():
        group = groups[name]
        if group.frozen:
            raise InputError(f"{where} drops channels of {name}, which has to stay whole: {group.frozen}")
        _check_whole_units(group, (module, side), channels, where)
        mask = masks.setdefault(name, torch.ones(group.n_channels, dtype=torch.bool))
        mask[list(channels)] = False
        if not bool(mask.any()):
            raise InputError(f"{where} leaves no channel of {name}; a layer must not be emptied")


@dataclass(frozen=True)
class _LayerSide:
    """One side of a layer: its number of positions, and the (group, channel) of each of them."""

    size: int
    channels: Mapping[int, tuple[str, int]]

    def left(self, masks: Mapping[str, Tensor]) -> list[int]:
        """Return the positions that stay under these keep-masks, ascending."""
        gone = {
            position
            for position, (group, channel) in self.channels.items()
            if group in masks and not masks[group][channel]
        }
        return [position for position in range(self.size) if position not in gone]


def _side_of(groups: ChannelGroups, module: str, side: Side) -> _LayerSide | None:
    """Return one side of a layer; None if no group has channels there."""
    channels: dict[int, tuple[str, int]] = {}
    dims = set()
    for group in groups:
        for member in group.members:
            if member.tensor == f"{module}.weight" and _SIDES.get(member.role) == side:
                dims.add(member.dim)
                channels |= {p: (group.name, i // member.repeat) for i, p in enumerate(member.positions)}
    if not dims:
        return None
    return _LayerSide(groups.tensor_shapes[f"{module}.weight"][dims.pop()], channels)


def _by_channel(layer: _LayerSide, positions: Iterable[int], where: str) -> dict[str, dict[int, set[int]]]:
    """Sort positions by group and channel."""
    found: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for position in positions:
        if position not in layer.channels:
            raise InputError(
                f"{where} drops position {position}, which is a channel of no group; it has to stay"
            )
        name, channel = layer.channels[position]
        found[name][channel].add(position)
    return found


def _check_whole_units(
    group: ChannelGroup, layer: tuple[str, Side], channels: Mapping[int, set[int]], where: str
) -> None:
    """Raise InputError if a channel of the group goes in part, counted in the group's narrowest layer."""
    owned = _positions(group)
    width = min(len(own[0]) for own in owned.values())
    for channel, positions in channels.items():
        own = owned[layer][channel]
        even = len(own) % width == 0
        roots = _roots(layer[1], len(own), width) if even else list(range(len(own)))
        reached = {root for position, root in zip(own, roots, strict=True) if position in positions}
        if reached != set(roots):
            raise InputError(
                f"{where} drops {len(positions)} of the {len(own)} positions {own[:6]}{'...' if len(own) > 6 else ''}, "
                f"which go together or not at all (channel {channel} of {group.name})"
            )


# ------------------------------------------------------------------------------------------------------- both


def _check_fits(model: nn.Module, groups: ChannelGroups) -> None:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, shape in groups.tensor_shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else "no such tensor"
        if found != shape:
            raise InputError(
                f"the groups do not fit the model: {name} has shape {shape} in the groups, found {found}; "
                "give the groups that find_groups found for it"
            )


def _positions(group: ChannelGroup) -> Positions:
    """Return the positions of each channel in each layer, from layers that make it to those that read it.

    Tensors of modules that are no plain layers (bare parameters, attention in one module) are left out.
    """
    ranks = {role: place for place, role in enumerate(_SIDES)}
    found: dict[tuple[str, Side], list[set[int]]] = {}
    for member in sorted(
        (m for m in group.members if m.role in _SIDES), key=lambda member: ranks[member.role]
    ):
        if member.tensor.rpartition(".")[2] in _OF_LAYERS:
            key = member.module, _SIDES[member.role]
            own = found.setdefault(key, [set() for _ in range(group.n_channels)])
            for i, position in enumerate(member.positions):
                own[i // member.repeat].add(position)
    return {key: [sorted(one) for one in own] for key, own in found.items()}


def _roots(side: Side, repeat: int, width: int) -> list[int]:
    """Return for each of a channel's `repeat` positions which of its `width` positions in another layer it belongs to.

    Rows are repeated chunk by chunk (queries, keys and values of a head). Columns that a flatten multiplies stand
    together.
    """
    if side == "out" and repeat > width:
        return [i % width for i in range(repeat)]
    return [i * width // repeat for i in range(repeat)]


def _torch_pruning() -> ModuleType:
    try:
        import torch_pruning
    except ImportError as error:
        raise InputError(
            "this needs the package torch_pruning, which is not installed: pip install 'torch-pruning>=1.6,<1.7'"
        ) from error
    return torch_pruning  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of Torch-Pruning, because this module checks what they warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch_pruning\b")
        yield
