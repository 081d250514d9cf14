"""The only place that knows torch_pruning: its dependency graph becomes plain names and indices.

torch-pruning infers from the autograd graph which layers share their channels (Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023). Its groups hold module objects and lists of indices aligned with the
channels of a root layer; here they become `Coupling`s: module names, sides and index pairs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch_pruning
from torch import nn

from sparsekit.errors import ModelError

Side = Literal["in", "out"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Touch:
    """One side of one module, and which of its positions belongs to which channel of the group's root.

    `pairs` holds (root channel, position). `norm` names the BatchNorm that directly follows a producer;
    `gate` marks a producer whose output only multiplies (through a sigmoid) what others produce.
    """

    module: str
    side: Side
    pairs: tuple[tuple[int, int], ...]
    norm: str | None = None
    gate: bool = False


@dataclass(frozen=True)
class Coupling:
    """A group as the graph sees it: root layer, its number of channels, what they touch, and what forbids a cut."""

    root: str
    n_channels: int
    touches: tuple[Touch, ...]
    obstacles: tuple[str, ...]


def is_depthwise(module: nn.Module) -> bool:
    """Whether every channel has a filter of its own (as many convolution groups as channels)."""
    return (
        isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels
    )


def trace_couplings(model: nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> list[Coupling]:
    """Couplings of every convolution and linear layer. Works on a copy; the model is left as it is.

    Raises ModelError if the model cannot run on the example or its graph cannot be built.
    """
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    names = {id(module): name for name, module in traced.named_modules()}
    names.update({id(parameter): name for name, parameter in traced.named_parameters()})
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bare parameters are reported as obstacles, in our own words
        with torch.enable_grad():
            try:
                graph.build_dependency(traced, example_inputs=example_inputs)
                return [_read_whole_group(graph, group, names) for group in _all_groups(graph)]
            except Exception as error:
                raise ModelError(
                    f"the dependency graph of {type(model).__name__} could not be built on an input of shape "
                    f"{[tuple(x.shape) for x in example_inputs]}: {type(error).__name__}: {error}"
                ) from error


def _all_groups(graph: Any) -> Iterator[Any]:
    return iter(graph.get_all_groups(root_module_types=[*_CONVOLUTIONS, nn.Linear]))


def _read_whole_group(graph: Any, group: Any, names: dict[int, str]) -> Coupling:
    """The coupling, with what torch-pruning loses: where parts of a layer meet, it reports the first to come.

    It remembers which positions of a layer it has seen, but not whose they are. So the channels that seem to
    reach no other layer are asked for by themselves.
    """
    coupling = _read_group(graph, group, names)
    root = group[0].dep
    lost = set(group[0].root_idxs) - _read_channels(coupling)
    while lost and not coupling.obstacles:
        rest = _read_group(
            graph, graph.get_pruning_group(root.target.module, root.handler, sorted(lost)), names
        )
        found = lost & _read_channels(rest)
        if not found:
            break
        coupling = replace(coupling, touches=_merged([*coupling.touches, *rest.touches]))
        lost -= found
    return coupling


def _read_channels(coupling: Coupling) -> set[int]:
    """The root's channels that some layer reads."""
    return {channel for touch in coupling.touches if touch.side == "in" for channel, _ in touch.pairs}


def _read_group(graph: Any, group: Any, names: dict[int, str]) -> Coupling:
    touches: list[Touch] = []
    obstacles: list[str] = []
    for item in group:
        node, handler = item.dep.target, item.dep.handler
        module = node.module
        obstacle = _obstacle(node, module, names)
        if obstacle:
            obstacles.append(obstacle)
        name = names.get(id(module))
        if name is None or isinstance(module, nn.Parameter) or not isinstance(module, _supported()):
            continue
        pairs = tuple(zip(item.root_idxs, item.idxs, strict=True))
        depthwise = is_depthwise(module)
        side: Side = "out" if depthwise or "out_channels" in handler.__name__ else "in"
        is_layer = isinstance(module, (*_CONVOLUTIONS, nn.Linear))
        touches.append(
            Touch(
                name,
                side,
                pairs,
                norm=_following_norm(node, names) if is_layer and side == "out" else None,
                gate=is_layer and side == "out" and not depthwise and _is_gate(node),
            )
        )
    root = names[id(group[0].dep.target.module)]
    return Coupling(root, len(set(group[0].root_idxs)), _merged(touches), tuple(dict.fromkeys(obstacles)))


def _supported() -> tuple[type[nn.Module], ...]:
    return (*_CONVOLUTIONS, nn.Linear, *_BATCH_NORMS)


def _obstacle(node: Any, module: Any, names: dict[int, str]) -> str:
    """Why a group that touches this node may not be cut, or an empty string."""
    name = names.get(id(module), "")
    if isinstance(module, nn.Parameter):
        return f"the bare parameter {name or 'without a name'} takes part"
    if (
        isinstance(module, (nn.LayerNorm, nn.GroupNorm))
        or "LayerNorm" in node.name
        or "GroupNorm" in node.name
    ):
        label = name or "a layer normalisation"
        return f"{label} mixes channels, so removing one changes all others"
    if "Attention" in node.name or "Softmax" in node.name or "Bmm" in node.name:
        return "it passes through attention, whose heads can only go as a whole"
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1 and not is_depthwise(module):
        return f"{name} is a grouped convolution ({module.groups} groups)"
    if name and not isinstance(module, _supported()):
        return f"{name} is a {type(module).__name__}, which sparsekit cannot cut"
    return ""


def _merged(touches: list[Touch]) -> tuple[Touch, ...]:
    """One touch for each (module, side): the graph lists a module once for each path that reaches it."""
    merged: dict[tuple[str, Side], Touch] = {}
    for touch in touches:
        key = (touch.module, touch.side)
        earlier = merged.get(key)
        pairs = touch.pairs if earlier is None else (*earlier.pairs, *touch.pairs)
        merged[key] = Touch(touch.module, touch.side, tuple(dict.fromkeys(pairs)), touch.norm, touch.gate)
    return tuple(merged.values())


def _following_norm(node: Any, names: dict[int, str]) -> str | None:
    """Name of the BatchNorm that all of this layer's output goes into directly, if there is one."""
    current = node
    while len(current.outputs) == 1:
        current = current.outputs[0]
        if isinstance(current.module, _BATCH_NORMS):
            return names.get(id(current.module))
        # A norm with a fused activation appears as its bare autograd operator, followed by the module.
        if "BatchNorm" not in current.name:
            return None
    return None


def _is_gate(node: Any) -> bool:
    """Whether the output passes a sigmoid and then only multiplies (the excitation of squeeze-and-excite)."""
    squashed = False
    current = node
    while len(current.outputs) == 1:
        current = current.outputs[0]
        if _is_layer(current):
            return False
        if "igmoid" in current.name:
            squashed = True
        elif "Mul" in current.name:
            return squashed
        elif "Add" in current.name or "Concat" in current.name:
            return False
    return False


def _is_layer(node: Any) -> bool:
    """Whether a graph node is a layer with weights rather than an operator between layers."""
    return isinstance(node.module, _supported())
