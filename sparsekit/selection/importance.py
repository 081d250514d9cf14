"""The importance of channels by their weights: the norms of their filters, with a BatchNorm folded in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member
from sparsekit.structure.masks import Scores


def filter_norms(model: nn.Module, groups: ChannelGroups) -> Scores:
    """Return the norm (n_channels,) of each channel's filters in every free group; comparable within a group.

    norm_c^2 = sum over producers of ||W_c||^2 x gamma_c^2 / (var_c + eps)

    The factor is that of the BatchNorm that follows directly; without one it is 1. A norm without running statistics
    has no var_c: the mean of ||W||^2 over the channels that it sees together stands for it. Float64, on the CPU.
    """
    state = model.state_dict()
    modules = dict(model.named_modules())
    return {group.name: _group_norms(group, state, modules) for group in groups.free}


def output_shares(model: nn.Module, groups: ChannelGroups) -> Scores:
    """Return the importance (n_channels,) of channels: their share of the outputs; comparable across groups.

    importance_c = sum over the layers that make the channel of MACs x ||W_c||^2 / ||W||^2

    The norms are those with the BatchNorm that follows folded in. Importance is 0 for channels that are zero, and
    infinite for channels that no layer makes (bare parameters, residual blocks). On the CPU.
    """
    state, modules = model.state_dict(), dict(model.named_modules())
    macs = {layer.weight: layer.macs for layer in groups.layers}
    zeros = zero_channels(model, groups)
    shares = {}
    for group in groups.free:
        makers = [m for m in (*group.of_role("producer"), *group.of_role("depthwise")) if m.tensor in macs]
        total = torch.full((group.n_channels,), 0.0 if makers else torch.inf, dtype=torch.float64)
        for member in makers:
            own, whole = _squares(group, member, state, modules)
            total += macs[member.tensor] * own / max(whole, torch.finfo(torch.float64).tiny)
        shares[group.name] = torch.where(zeros[group.name], 0.0, total) if makers else total
    return shares


def zero_channels(model: nn.Module, groups: ChannelGroups) -> dict[str, Tensor]:
    """Return which channels of each free group have all their penalised weights at 0: bool (n_channels,), on the CPU.

    A norm's shift does not count: a channel of scale 0 is a constant, which the cut folds. It does where something adds
    up the channels (`summed`). A residual block is zero if all its `silenced` members are, shifts included: nothing
    folds what it adds.
    """
    state = model.state_dict()
    zeros = {}
    for group in groups.free:
        shifts = set() if group.summed else {f"{scale.module}.bias" for scale in group.scales}
        members = group.silenced or tuple(m for m in group.penalised if m.tensor not in shifts)
        dead = torch.full((group.n_channels,), bool(members))
        for member in members:
            dead &= (rows(state[member.tensor], member) == 0).all(1).cpu()
        zeros[group.name] = dead
    return zeros


def all_alike(groups: ChannelGroups) -> Scores:
    """Return equal importance for all channels, to ask how far costs can fall."""
    return {group.name: torch.ones(group.n_channels) for group in groups.free}


def rows(tensor: Tensor, member: Member) -> Tensor:
    """Return the elements of `tensor` that each channel of the member's group owns, as (n_channels, elements)."""
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
        total += _squares(group, member, state, modules)[0]
    return total.sqrt()


def _squares(
    group: ChannelGroup, member: Member, state: dict[str, Tensor], modules: dict[str, nn.Module]
) -> tuple[Tensor, float]:
    """Return the squared norms (n_channels,) of what a producer's filters make of each channel, and of all its filters.

    The norm behind them is folded in. It may run over fewer channels than there are filters: a linear layer whose
    outputs become maps has one for each position.
    """
    squares = state[member.tensor].double().movedim(member.dim, 0).flatten(1).square().sum(1).cpu()
    of_norm = next((m for m in group.members if m.module == member.norm and m.role == "norm"), None)
    if member.norm is None or of_norm is None or len(state[of_norm.tensor]) == len(squares):
        folded = squares if member.norm is None else _folded(squares, modules[member.norm])
        own = folded[list(member.positions)].reshape(group.n_channels, member.repeat).sum(1)
        return own, float(folded.sum())
    width = len(state[of_norm.tensor])
    gains = _folded(torch.ones(width, dtype=torch.float64), modules[member.norm])
    maps = squares[list(member.positions)].reshape(group.n_channels, -1, len(squares) // width).sum(2)
    own = (maps * gains[list(of_norm.positions)].reshape(group.n_channels, -1)).sum(1)
    return own, float(squares.sum() * gains.mean())


def _folded(squares: Tensor, norm: nn.Module) -> Tensor:
    """Return the squared norms (channels,) of filters with the norm behind them folded in; float64, on the CPU."""
    scale, variance = getattr(norm, "weight", None), getattr(norm, "running_var", None)
    gained: Tensor = squares if scale is None else squares * scale.detach().double().cpu().square()
    if isinstance(variance, Tensor):
        return gained / (variance.double().cpu() + getattr(norm, "eps", 0.0))
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return gained
    seen = len(squares) // norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
    means = squares.reshape(-1, seen).mean(1).repeat_interleave(seen)
    return gained / means.clamp_min(torch.finfo(torch.float64).tiny)
