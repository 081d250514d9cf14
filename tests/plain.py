"""Groups and Sparsifiers at their plainest, for tests that vary one thing at a time.

Groups are not rounded and may lose all channels but one; at a constant strength all channels are shrunk alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

import sparsekit as sk
from sparsekit.sparsify.schedules import PhaseShares


def find_groups(model: nn.Module, example_input: Any, **options: Any) -> sk.ChannelGroups:
    """The groups of a model, in multiples of 1."""
    return sk.find_groups(model, example_input, **{"round_to": 1, "min_channels": 1, **options})


def rounded(groups: sk.ChannelGroups, rounding: Mapping[str, tuple[int, int]]) -> sk.ChannelGroups:
    """The groups with the (multiple, least) given for each."""
    named = {name: sk.Rounding(*numbers) for name, numbers in rounding.items()}
    return replace(groups, groups=tuple(replace(g, rounding=named.get(g.name, g.rounding)) for g in groups))


def sparsifier(
    model: nn.Module,
    groups: sk.ChannelGroups,
    *,
    penalty: Any = "group_lasso",
    strength: Any = 1e-3,
    total_steps: int | None = None,
    target: Mapping[Any, float] | None = None,
    shares: PhaseShares | None = None,
    round_to: int | None = None,
    min_channels: int | None = None,
    adaptive: float = 0.0,
    **options: Any,
) -> sk.Sparsifier:
    """A Sparsifier of constant strength or, with strength "auto", of one that is steered towards `target`."""
    if round_to is not None or min_channels is not None:
        least = 1 if min_channels is None else min_channels
        groups = groups.with_rounding(round_to or 1, least)
    if strength == "auto":
        chosen: Any = sk.AutoStrength(target or {}, total_steps or 0, shares or PhaseShares(), **options)
    else:
        chosen = sk.ConstantStrength(strength, total_steps, shares, adaptive=adaptive, **options)
    return sk.Sparsifier(model, groups, penalty, strength=chosen)
