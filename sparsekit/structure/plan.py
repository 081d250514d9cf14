"""The PrunePlan: what will be cut, as plain data with a JSON form, made from keep-masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from sparsekit.errors import FileError, InputError
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Role
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.places import Place


@dataclass(frozen=True)
class TensorCut:
    """The positions that stay (`keep`) and go (`drop`) along one dimension of a state-dict entry, ascending.

    Those of `silenced`, some of `drop`, are zero in the masked model: of channels that something adds up.
    With role "size" `tensor` is an integer attribute, or entry `dim` of a tuple, that becomes len(keep).
    """

    tensor: str
    dim: int
    role: Role
    keep: tuple[int, ...]
    drop: tuple[int, ...]
    silenced: tuple[int, ...] = ()


@dataclass(frozen=True)
class GroupCut:
    """How many channels a group had, and which of them stay (ascending)."""

    name: str
    n_channels: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class BlockCut:
    """A residual block that goes as a whole: `module` passes its input on, as it does when `scales` are zero.

    They are its layer scales, or all parameters of the last layers of its branches.
    """

    module: str
    scales: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether a tensor, attribute or module of this name goes with the block."""
        return name == self.module or name.startswith(f"{self.module}.")


@dataclass(frozen=True)
class PrunePlan:
    """What will be cut: `cuts` has every tensor that shrinks, `groups` every group that was decided on.

    `inputs` describes the arguments of the example. `rewrites` are the places in the model's code that have to leave a
    size to torch. `blocks` go as a whole, so nothing inside them is in `cuts` or `rewrites`.
    """

    cuts: tuple[TensorCut, ...]
    groups: tuple[GroupCut, ...]
    inputs: InputSpec
    rewrites: tuple[Place, ...] = ()
    blocks: tuple[BlockCut, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as dictionaries and lists. `from_json` gives back an equal plan."""
        return {**asdict(replace(self, inputs=InputSpec())), "inputs": self.inputs.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PrunePlan:
        """Read what `to_json` returned, also after a round trip through JSON text. Raises FileError for other data."""
        try:
            plan = PrunePlan(
                cuts=tuple(
                    TensorCut(
                        c["tensor"],
                        c["dim"],
                        c["role"],
                        _listed(c["keep"]),
                        _listed(c["drop"]),
                        _listed(c["silenced"]),
                    )
                    for c in _listed(data["cuts"])
                ),
                groups=tuple(
                    GroupCut(g["name"], g["n_channels"], _listed(g["kept"])) for g in _listed(data["groups"])
                ),
                inputs=InputSpec.from_json(data["inputs"]),
                rewrites=tuple(Place(**place) for place in _listed(data["rewrites"])),
                blocks=tuple(BlockCut(b["module"], _listed(b["scales"])) for b in _listed(data["blocks"])),
            )
            _check_types(plan)
            _check_positions(plan)
            return plan
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"this is no pruning plan: {type(error).__name__}: {error}; expected the keys cuts, groups, "
                "inputs, rewrites and blocks as PrunePlan.to_json writes them"
            ) from error


def make_plan(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> PrunePlan:
    """Make the plan of keep-masks (group name -> bool (n_channels,), True = keep).

    Groups without a mask stay whole. The order of masks and groups does not matter. Raises InputError for a mask of an
    unknown group, of the wrong length or dtype, that keeps nothing, or that removes channels of a frozen group.
    """
    known = {group.name: group for group in groups}
    dropped: dict[tuple[str, int], set[int]] = defaultdict(set)
    silenced: dict[tuple[str, int], set[int]] = defaultdict(set)
    roles: dict[tuple[str, int], Role] = {}
    decided: list[GroupCut] = []
    blocks: list[BlockCut] = []
    for name, mask in sorted(masks.items()):
        if name not in known:
            raise InputError(f"a mask names the group {name!r}, which the model does not have")
        group = known[name]
        keep = _checked(mask, group)
        decided.append(GroupCut(name, group.n_channels, tuple(c for c, bit in enumerate(keep) if bit)))
        if all(keep):
            continue
        if group.bypass:
            blocks.append(BlockCut(group.bypass, tuple(member.tensor for member in group.silenced)))
            continue
        for member in group.members:
            key = (member.tensor, member.dim)
            roles[key] = member.role
            gone = {p for order, p in enumerate(member.positions) if not keep[order // member.repeat]}
            dropped[key] |= gone
            if group.summed and member.penalised:
                silenced[key] |= gone
    sizes = {**groups.tensor_shapes, **groups.attributes}
    cuts = tuple(
        TensorCut(
            tensor,
            dim,
            roles[tensor, dim],
            keep=tuple(i for i in range(sizes[tensor][dim]) if i not in drop),
            drop=tuple(sorted(drop)),
            silenced=tuple(sorted(silenced[tensor, dim])),
        )
        for (tensor, dim), drop in sorted(dropped.items())
        if not any(block.holds(tensor) for block in blocks)
    )
    shrunk = [known[cut.name] for cut in decided if len(cut.kept) < cut.n_channels]
    rewrites = {
        place
        for group in shrunk
        for place in group.rewrites
        if not any(block.holds(place.module) for block in blocks)
    }
    return PrunePlan(cuts, tuple(decided), groups.inputs, tuple(sorted(rewrites)), tuple(blocks))


def _checked(mask: Tensor, group: ChannelGroup) -> list[bool]:
    """The entries of a keep-mask. Raises InputError if the group cannot have this mask."""
    name = group.name
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (group.n_channels,):
        raise InputError(
            f"the mask of {name} must be bool with {group.n_channels} entries, one for each channel, "
            f"got {_described(mask)}"
        )
    keep: list[bool] = mask.tolist()
    if not any(keep) and not group.bypass:
        raise InputError(f"the mask of {name} keeps no channel; a layer must not be emptied")
    if sum(keep) < group.least and not group.bypass:
        raise InputError(
            f"the mask of {name} keeps {sum(keep)} channel; the model's code needs {group.least} at least"
        )
    if group.frozen and not all(keep):
        raise InputError(f"the mask of {name} removes channels, but the group is frozen: {group.frozen}")
    return keep


def _described(mask: object) -> str:
    if not isinstance(mask, Tensor):
        return f"{type(mask).__name__}; give a tensor"
    return f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}"


def _listed(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list where {value!r:.40} stands")
    return tuple(value)


def _check_types(plan: PrunePlan) -> None:
    """Raise TypeError for values of another type than a plan has."""
    expected: list[tuple[Any, type]] = []
    for cut in plan.cuts:
        expected += [(cut.tensor, str), (cut.dim, int)]
        expected += [(n, int) for n in (*cut.keep, *cut.drop, *cut.silenced)]
        if cut.role not in get_args(Role):
            raise TypeError(
                f"the role of {cut.tensor} must be one of {', '.join(get_args(Role))}, got {cut.role!r}"
            )
    for group in plan.groups:
        expected += [(group.name, str), (group.n_channels, int), *((n, int) for n in group.kept)]
    for place in plan.rewrites:
        expected += [(place.module, str), (place.method, str), (place.source, str)]
        expected += [(place.call, int), (place.argument, int), (place.size, int)]
    expected += [(name, str) for block in plan.blocks for name in (block.module, *block.scales)]
    for value, kind in expected:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__} where {value!r:.40} stands")


def _check_positions(plan: PrunePlan) -> None:
    """Raise ValueError for positions, channels or shapes that no plan can have."""
    seen: set[tuple[str, int]] = set()
    for cut in plan.cuts:
        if cut.dim < 0 or sorted((*cut.keep, *cut.drop)) != list(range(len(cut.keep) + len(cut.drop))):
            raise ValueError(f"keep and drop of {cut.tensor} are not each position once")
        if not set(cut.silenced) <= set(cut.drop):
            raise ValueError(f"it silences what it does not drop of {cut.tensor}")
        if not cut.keep:
            raise ValueError(f"it keeps nothing of {cut.tensor}; a layer must not be emptied")
        if (cut.tensor, cut.dim) in seen:
            raise ValueError(f"it cuts {cut.tensor} twice in dimension {cut.dim}")
        seen.add((cut.tensor, cut.dim))
    for block in plan.blocks:
        if inside := [cut.tensor for cut in plan.cuts if block.holds(cut.tensor)]:
            raise ValueError(f"it cuts {inside[0]}, and takes out {block.module}, which holds it")
    for group in plan.groups:
        if not set(group.kept) <= set(range(group.n_channels)):
            raise ValueError(f"{group.name} keeps channels that it does not have")
