"""Per-channel numbers used to rank: the norm of the filter each channel has once its BatchNorm is folded in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.groups import ChannelGroup, ChannelGroups, Member


def rows(tensor: Tensor, member: Member) -> Tensor:
    """View `tensor` as (n_channels, elements): everything of it that each channel of the member's group owns.

    A copy, in channel order. The member's dimension comes first, `repeat` positions a channel.
    """
    moved = tensor.movedim(member.dim, 0)
    if member.positions != tuple(range(tensor.shape[member.dim])):
        moved = moved[torch.tensor(member.positions, device=tensor.device)]
    return moved.reshape(len(member.positions) // member.repeat, -1)


def channel_scores(model: nn.Module, groups: ChannelGroups) -> dict[str, Tensor]:
    """Score (n_channels,) of each free group, on the CPU in float64, comparable within a group.

    score_c^2 = sum over producers of ||W_c||^2 x gamma_c^2 / (var_c + eps), the norm of the filter after folding
    the BatchNorm that follows directly; without one the factor is 1. Gates and norms elsewhere do not count.
    """
    state = model.state_dict()
    modules = dict(model.named_modules())
    return {group.name: _group_score(group, state, modules) for group in groups.free}


def _group_score(group: ChannelGroup, state: dict[str, Tensor], modules: dict[str, nn.Module]) -> Tensor:
    total = torch.zeros(group.n_channels, dtype=torch.float64)
    for member in group.of_role("producer"):
        weighs = member.norm is not None or member.penalised
        if not member.tensor.endswith(".weight") or not weighs:
            continue
        squares = rows(state[member.tensor].double(), member).square().sum(1).cpu()
        if member.norm is not None:
            squares = squares * _folded_scale(group, member.norm, state, modules).square()
        total += squares
    return total.sqrt()


def _folded_scale(
    group: ChannelGroup, norm: str, state: dict[str, Tensor], modules: dict[str, nn.Module]
) -> Tensor:
    """gamma / sqrt(var + eps) for each channel of the group; gamma alone where no statistics are kept."""
    entries = {m.tensor.rpartition(".")[2]: m for m in group.of_role("norm") if m.module == norm}
    scale = torch.ones(group.n_channels, dtype=torch.float64)
    if "weight" in entries:
        scale = rows(state[f"{norm}.weight"].double(), entries["weight"]).mean(1).cpu()
    if "running_var" in entries:
        variance = rows(state[f"{norm}.running_var"].double(), entries["running_var"]).mean(1).cpu()
        scale = scale / (variance + float(str(modules[norm].eps))).sqrt()
    return scale


def zero_channels(model: nn.Module, groups: ChannelGroups) -> dict[str, Tensor]:
    """Which channels (bool (n_channels,), on the CPU) of each free group have all their penalised weights at 0."""
    state = model.state_dict()
    zeros = {}
    for group in groups.free:
        dead = torch.full((group.n_channels,), bool(group.penalised))
        for member in group.penalised:
            dead &= (rows(state[member.tensor], member) == 0).all(1).cpu()
        zeros[group.name] = dead
    return zeros
