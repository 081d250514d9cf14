"""A network by hand, its groups, statistics, and inputs kept apart."""

from __future__ import annotations

from typing import Any

import torch
from models_by_hand import build
from plain import find_groups
from torch import Tensor, nn

import sparsekit as sk


def prepared(
    name: str, **options: Any
) -> tuple[nn.Module, sk.ChannelGroups, sk.InputStatistics, tuple[Tensor, ...]]:
    model, example = build(name)
    groups = find_groups(model, example, **options)
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(40, *x.shape[1:], generator=generator, dtype=torch.float64) for x in example)
    used, apart = tuple(x[:24] for x in inputs), tuple(x[24:] for x in inputs)
    return model, groups, sk.input_statistics(model, groups, [used]), apart


NAMES = ["SqueezeExcite", "Concatenation", "FlattenBeforeLinear", "GroupedConv", "LayerScale", "Transposed"]
