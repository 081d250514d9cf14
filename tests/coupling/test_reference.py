"""Groups against those of torch-pruning's dependency graph, which finds them by another way (autograd's records)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import pytest
import timm
import torch
import torch_pruning as tp
from models_by_hand import BY_HAND, build
from timm.models.densenet import DenseNet
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.structure.groups import ChannelGroup, Member

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
)
# For (module, side): the indices that go.
Touched = dict[tuple[str, str], set[int]]

BY_HAND_AND_PLAIN = [
    "Residual",
    "Concatenation",
    "FlattenBeforeLinear",
    "Transposed",
    "Depthwise",
    "SqueezeExcite",
    "TwoInTwoOut",
    "Siamese",
    "OneDimensional",
    "DictionaryOfOutputs",
    "ThreeDimensional",
]
TIMM = [
    "resnet18",
    "mobilenetv3_small_050",
    "legacy_seresnet18",
    "small_densenet",
    "test_resnet",
    "test_efficientnet",
]


def model_of(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if name in BY_HAND:
        model, inputs = build(name)
        return model.float(), tuple(x.float() for x in inputs)
    if name == "small_densenet":
        return DenseNet(8, (2, 3, 2), num_classes=5), (torch.randn(1, 3, 64, 64),)
    return timm.create_model(name, num_classes=5), (torch.randn(1, 3, 64, 64),)


def dependency_graph(model: nn.Module, inputs: Sequence[Tensor]) -> tp.DependencyGraph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(model, example_inputs=tuple(inputs))


def root_of(group: ChannelGroup) -> Member:
    return next(
        m for m in group.members if m.role in ("producer", "depthwise") and m.tensor.endswith("weight")
    )


def touched_by_reference(
    graph: tp.DependencyGraph, model: nn.Module, module: str, indices: list[int]
) -> Touched:
    layer = model.get_submodule(module)
    found: Touched = {}
    names = {one: name for name, one in model.named_modules()}
    for dependency, pruned in graph.get_pruning_group(
        layer, graph.get_pruner_of_module(layer).prune_out_channels, indices
    ):
        target = dependency.target.module
        if isinstance(target, LAYERS):
            side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
            found.setdefault((names[target], side), set()).update(pruned)
    return found


def touched_by_us(group: ChannelGroup, channels: Sequence[int]) -> Touched:
    found: Touched = {}
    for member in group.members:
        if member.role != "size":
            side = "in" if member.role == "consumer" else "out"
            own = found.setdefault((member.module, side), set())
            for channel in channels:
                own.update(member.positions[channel * member.repeat : (channel + 1) * member.repeat])
    return found


@pytest.mark.parametrize("name", [*BY_HAND_AND_PLAIN, *TIMM])
def test_each_channel_touches_the_layers_and_indices_that_torch_pruning_finds(name: str) -> None:
    model, inputs = model_of(name)
    groups = find_groups(model, inputs)
    traced = copy.deepcopy(model)
    graph = dependency_graph(traced, inputs)
    compared = 0
    for group in groups.free:
        root = root_of(group)
        for channels in ([0], [group.n_channels - 1], list(range(group.n_channels))):
            rows = sorted(
                {i for c in channels for i in root.positions[c * root.repeat : (c + 1) * root.repeat]}
            )
            reference = touched_by_reference(graph, traced, root.module, rows)
            assert touched_by_us(group, channels) == reference, (group.name, channels)
        compared += 1
    assert compared == len(groups.free) > 0
