"""How important channels are by their weights: the norms of their filters, once a BatchNorm is folded in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member
from sparsekit.structure.masks import Scores


def filter_norms(model: nn.Module, groups: ChannelGroups) -> Scores:
    """The norm of each channel's filters (n_channels,) in every free group; comparable within a group.

    norm_c^2 = sum over producers of ||W_c||^2 x gamma_c^2 / (var_c + eps), after folding the BatchNorm that
    follows directly; without one the factor is 1. Gates and norms elsewhere do not count. On the CPU, in float64.
    """
    state = model.state_dict()
    modules = dict(model.named_modules())
    return {group.name: _group_norms(group, state, modules) for group in groups.free}


def output_shares(model: nn.Module, groups: ChannelGroups) -> Scores:
    """How much of its layers' output each channel makes (n_channels,), in MACs; comparable across groups.

    importance_c = sum over the layers that make the channel of MACs x ||W_c||^2 / ||W||^2, norms after folding a
    BatchNorm that follows: the channel's share of the layer's output. 0 for channels that are zero; infinite for others
    that no layer makes (bare parameters, whole blocks), because no filter tells how important they are. On the CPU.
    """
    state, modules = model.state_dict(), dict(model.named_modules())
    macs = {layer.weight: layer.macs for layer in groups.layers}
    zeros = zero_channels(model, groups)
    shares = {}
    for group in groups.free:
        makers = [m for m in (*group.of_role("producer"), *group.of_role("depthwise")) if m.tensor in macs]
        total = torch.full((group.n_channels,), 0.0 if makers else torch.inf, dtype=torch.float64)
        for member in makers:
            squares = state[member.tensor].double().movedim(member.dim, 0).flatten(1).square().sum(1).cpu()
            if member.norm is not None:
                squares = squares * _folded_scale(modules[member.norm]).square()
            share = squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
            own = share[list(member.positions)].reshape(group.n_channels, member.repeat).sum(1)
            total += macs[member.tensor] * own
        shares[group.name] = torch.where(zeros[group.name], 0.0, total)
    return shares


def zero_channels(model: nn.Module, groups: ChannelGroups) -> dict[str, Tensor]:
    """Which channels (bool (n_channels,), on the CPU) of each free group have all their penalised weights at 0.

    The shift of a norm does not count beside its scale: a channel of scale 0 is constant, and the cut folds that.
    """
    state = model.state_dict()
    zeros = {}
    for group in groups.free:
        shifts = {f"{scale.module}.bias" for scale in group.scales}
        members = [m for m in group.penalised if m.tensor not in shifts]
        dead = torch.full((group.n_channels,), bool(members))
        for member in members:
            dead &= (rows(state[member.tensor], member) == 0).all(1).cpu()
        zeros[group.name] = dead
    return zeros


def all_alike(groups: ChannelGroups) -> Scores:
    """Importance that is the same for all channels, to ask how far costs can fall."""
    return {group.name: torch.ones(group.n_channels) for group in groups.free}


def rows(tensor: Tensor, member: Member) -> Tensor:
    """View `tensor` as (n_channels, elements): everything of it that each channel of the member's group owns.

    A copy, in channel order. The member's dimension comes first, `repeat` positions a channel.
    """
    moved = tensor.movedim(member.dim, 0)
    if member.positions != tuple(range(tensor.shape[member.dim])):
        moved = moved[torch.tensor(member.positions, device=tensor.device)]
    return moved.reshape(len(member.positions) // member.repeat, -1)


def _group_norms(group: ChannelGroup, state: dict[str, Tensor], modules: dict[str, nn.Module]) -> Tensor:
    total = torch.zeros(group.n_channels, dtype=torch.float64)
    for member in group.of_role("producer"):
        weighs = member.norm is not None or member.penalised
        if not member.tensor.endswith(".weight") or not weighs:
            continue
        squares = state[member.tensor].double().movedim(member.dim, 0).flatten(1).square().sum(1).cpu()
        if member.norm is not None:
            squares = squares * _folded_scale(modules[member.norm]).square()
        total += squares[list(member.positions)].reshape(group.n_channels, member.repeat).sum(1)
    return total.sqrt()


def _folded_scale(norm: nn.Module) -> Tensor:
    """gamma / sqrt(var + eps) of a BatchNorm, without what it does not have; float64, on the CPU."""
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    scale = torch.ones(norm.num_features, dtype=torch.float64)
    if norm.affine:
        scale = norm.weight.detach().double().cpu()
    if norm.running_var is not None:
        scale = scale / (norm.running_var.double().cpu() + norm.eps).sqrt()
    return scale
