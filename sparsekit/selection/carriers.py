"""Channels that have to stay because they carry the constants of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparsekit.selection.importance import filter_norms, zero_channels
from sparsekit.selection.rounding import keep_too
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.masks import Masks
from sparsekit.surgery.constants import (
    CONSTANT_TOLERANCE,
    Reading,
    bias_is_exact,
    observe_inputs,
    plain_layers,
    readers_of,
)


def keep_carriers(model: nn.Module, groups: ChannelGroups, masks: Masks) -> Masks:
    """Keep a carrier in each group that would otherwise lose constants; returns new masks.

    A dead channel after a BatchNorm is a constant. Only a kept channel, the carrier, can bring constants to a padded
    layer; `apply_plan` merges them into it. The carrier is the dropped channel with the largest constant, summed over
    the layers that lose any. It replaces a kept channel that is dead and 0 everywhere, such as one that rounding kept;
    without one the group keeps one channel more, rounded up again. Each group gets at most one carrier.
    """
    kept = dict(masks)
    cut = [group for group in groups.free if group.name in kept and not bool(kept[group.name].all())]
    readings = observe_inputs(model, groups.inputs, readers_of(model, _readers(cut)))
    stays = {tensor: torch.ones(len(reading.low), dtype=torch.bool) for tensor, reading in readings.items()}
    plain = plain_layers(model, readings)
    merging = {tensor: readings[tensor] for tensor, module in plain.items() if not bias_is_exact(module)}
    norms, dead = filter_norms(model, groups), zero_channels(model, groups)
    for group in cut:
        _mark_(stays, group, kept[group.name])
    for group in cut:
        channel = _missing_carrier(group, merging, stays)
        if channel is not None:
            spare = dead[group.name] & _reads_zero(group, readings)
            kept[group.name] = keep_too(
                kept[group.name], channel, spare, norms[group.name], group.rounding.multiple
            )
            _mark_(stays, group, kept[group.name])
    return kept


def _readers(groups: Iterable[ChannelGroup]) -> dict[str, None]:
    """Name the tensors that read any channel of these groups, in order."""
    return {member.tensor: None for group in groups for member in group.of_role("consumer")}


def _mark_(stays: Mapping[str, Tensor], group: ChannelGroup, mask: Tensor) -> None:
    """Note in `stays`, by reader bool (n_inputs,), which channels of the group its mask keeps."""
    for member in group.of_role("consumer"):
        if member.tensor in stays:
            stays[member.tensor][list(member.positions)] = mask.repeat_interleave(member.repeat)


def _missing_carrier(
    group: ChannelGroup, readings: Mapping[str, Reading], stays: Mapping[str, Tensor]
) -> int | None:
    """Return the dropped channel with the largest constants; None if no layer loses any."""
    size = torch.zeros(group.n_channels, dtype=torch.float64)
    for member in group.of_role("consumer"):
        reading = readings.get(member.tensor)
        if reading is None or reading.carrier(stays[member.tensor]) is not None:
            continue
        usable = reading.carriers & ~stays[member.tensor]
        lost = reading.constants.abs().where(usable, 0.0)[list(member.positions)]
        size += lost.reshape(-1, member.repeat).amax(1)
    # A constant no larger than the noise of an observation needs no carrier.
    return int(size.argmax()) if bool((size > CONSTANT_TOLERANCE).any()) else None


def _reads_zero(group: ChannelGroup, readings: Mapping[str, Reading]) -> Tensor:
    """Return which channels (bool (n_channels,)) of the group every reader saw as 0 throughout."""
    zero = torch.ones(group.n_channels, dtype=torch.bool)
    for member in group.of_role("consumer"):
        reading = readings.get(member.tensor)
        if reading is None:  # it was not observed
            return torch.zeros_like(zero)
        seen = ((reading.low == 0) & (reading.high == 0))[list(member.positions)]
        zero &= seen.reshape(-1, member.repeat).all(1)
    return zero
