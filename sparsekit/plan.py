"""What will be cut, as plain data: keep-masks become a PrunePlan, which has a JSON form and touches no tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import FileError, InputError
from sparsekit.groups import ChannelGroups, Role
from sparsekit.rewriting import Place


@dataclass(frozen=True)
class TensorCut:
    """Positions that stay (`keep`, ascending) and go (`drop`) along one dimension of one state-dict entry.

    Of role "size": `tensor` is an integer attribute (entry `dim` of it, if it is a tuple) that becomes len(keep).
    """

    tensor: str
    dim: int
    role: Role
    keep: tuple[int, ...]
    drop: tuple[int, ...]


@dataclass(frozen=True)
class GroupCut:
    """How many channels a group had and which of them stay (ascending)."""

    name: str
    n_channels: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class PrunePlan:
    """Every tensor that shrinks and every group that was decided on. `input_shapes` are the model's examples.

    `rewrites` are the places in the model's code that have to leave a size to torch (see `rewriting`).
    """

    cuts: tuple[TensorCut, ...]
    groups: tuple[GroupCut, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    rewrites: tuple[Place, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; `from_json` gives back an equal plan."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PrunePlan:
        """Inverse of `to_json`, also after a round trip through JSON text. Raises FileError on other data."""
        try:
            plan = PrunePlan(
                cuts=tuple(
                    TensorCut(c["tensor"], c["dim"], c["role"], tuple(c["keep"]), tuple(c["drop"]))
                    for c in data["cuts"]
                ),
                groups=tuple(GroupCut(g["name"], g["n_channels"], tuple(g["kept"])) for g in data["groups"]),
                input_shapes=tuple(tuple(shape) for shape in data["input_shapes"]),
                rewrites=tuple(Place(**place) for place in data["rewrites"]),
            )
            for cut in plan.cuts:
                if sorted((*cut.keep, *cut.drop)) != list(range(len(cut.keep) + len(cut.drop))):
                    raise ValueError(f"keep and drop of {cut.tensor} are not each position once")
            return plan
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"this is no pruning plan: {type(error).__name__}: {error}; expected the keys cuts, groups, "
                "input_shapes and rewrites as PrunePlan.to_json writes them"
            ) from error


def make_plan(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> PrunePlan:
    """Turn keep-masks (group name -> bool (n_channels,), True = keep) into a plan.

    Groups without a mask stay whole. Raises InputError for a mask of an unknown or frozen group, of the wrong
    length or dtype, or one that keeps nothing.
    """
    known = {group.name: group for group in groups}
    dropped: dict[tuple[str, int], set[int]] = defaultdict(set)
    roles: dict[tuple[str, int], Role] = {}
    decided: list[GroupCut] = []
    for name, mask in masks.items():
        if name not in known:
            raise InputError(f"a mask names the group {name!r}, which the model does not have")
        group = known[name]
        if mask.dtype != torch.bool or mask.shape != (group.n_channels,):
            raise InputError(
                f"the mask of {name} must be bool with {group.n_channels} entries, one a channel of its group, "
                f"got {str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}"
            )
        keep: list[bool] = mask.tolist()
        if not any(keep):
            raise InputError(f"the mask of {name} keeps no channel; a layer must not be emptied")
        if group.frozen and not all(keep):
            raise InputError(f"the mask of {name} removes channels, but the group is frozen: {group.frozen}")
        decided.append(GroupCut(name, group.n_channels, tuple(c for c, bit in enumerate(keep) if bit)))
        if all(keep):
            continue
        for member in group.members:
            key = (member.tensor, member.dim)
            roles[key] = member.role
            for order, position in enumerate(member.positions):
                if not keep[order // member.repeat]:
                    dropped[key].add(position)
    sizes = {**groups.tensor_shapes, **groups.attributes}
    cuts = tuple(
        TensorCut(
            tensor,
            dim,
            roles[tensor, dim],
            keep=tuple(i for i in range(sizes[tensor][dim]) if i not in drop),
            drop=tuple(sorted(drop)),
        )
        for (tensor, dim), drop in dropped.items()
    )
    shrunk = [known[cut.name] for cut in decided if len(cut.kept) < cut.n_channels]
    rewrites = {place for group in shrunk for place in group.rewrites}
    return PrunePlan(cuts, tuple(decided), groups.input_shapes, tuple(sorted(rewrites)))
