"""What will be cut, as plain data: keep-masks become a PrunePlan, which has a JSON form and touches no tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

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
class BlockCut:
    """A residual block that goes as a whole: `module` passes its input on, as it does once `scales` are zero."""

    module: str
    scales: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether a tensor, attribute or module of this name goes with the block."""
        return name == self.module or name.startswith(f"{self.module}.")


@dataclass(frozen=True)
class PrunePlan:
    """Every tensor that shrinks and every group that was decided on. `input_shapes` are the model's examples.

    `rewrites` are the places in the model's code that have to leave a size to torch (see `rewriting`). Nothing of what
    `blocks` hold is among them: it goes.
    """

    cuts: tuple[TensorCut, ...]
    groups: tuple[GroupCut, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    rewrites: tuple[Place, ...] = ()
    blocks: tuple[BlockCut, ...] = ()

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
                blocks=tuple(BlockCut(b["module"], tuple(b["scales"])) for b in data["blocks"]),
            )
            _check_types(plan)
            _check_positions(plan)
            return plan
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"this is no pruning plan: {type(error).__name__}: {error}; expected the keys cuts, groups, "
                "input_shapes, rewrites and blocks as PrunePlan.to_json writes them"
            ) from error


def _check_types(plan: PrunePlan) -> None:
    """Raise TypeError for values that from_json took as they came."""
    expected: list[tuple[Any, type]] = []
    for cut in plan.cuts:
        expected += [(cut.tensor, str), (cut.dim, int), *((n, int) for n in (*cut.keep, *cut.drop))]
        if cut.role not in get_args(Role):
            raise TypeError(
                f"the role of {cut.tensor} must be one of {', '.join(get_args(Role))}, got {cut.role!r}"
            )
    for group in plan.groups:
        expected += [(group.name, str), (group.n_channels, int), *((n, int) for n in group.kept)]
    expected += [(size, int) for shape in plan.input_shapes for size in shape]
    for place in plan.rewrites:
        expected += [(place.module, str), (place.method, str), (place.source, str)]
        expected += [(place.call, int), (place.argument, int), (place.size, int)]
    expected += [(name, str) for block in plan.blocks for name in (block.module, *block.scales)]
    for value, kind in expected:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__} where {value!r:.40} stands")


def _check_positions(plan: PrunePlan) -> None:
    """Raise ValueError for numbers that no plan can have."""
    seen: set[tuple[str, int]] = set()
    for cut in plan.cuts:
        if cut.dim < 0 or sorted((*cut.keep, *cut.drop)) != list(range(len(cut.keep) + len(cut.drop))):
            raise ValueError(f"keep and drop of {cut.tensor} are not each position once")
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
    if any(size < 1 for shape in plan.input_shapes for size in shape):
        raise ValueError("an input has an impossible shape")


def make_plan(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> PrunePlan:
    """Turn keep-masks (group name -> bool (n_channels,), True = keep) into a plan.

    Groups without a mask stay whole. Equal decisions give equal plans, in whatever order masks and groups come.
    Raises InputError for a mask of an unknown or frozen group, of the wrong length or dtype, or one that keeps
    nothing.
    """
    known = {group.name: group for group in groups}
    dropped: dict[tuple[str, int], set[int]] = defaultdict(set)
    roles: dict[tuple[str, int], Role] = {}
    decided: list[GroupCut] = []
    blocks: list[BlockCut] = []
    for name, mask in sorted(masks.items()):
        if name not in known:
            raise InputError(f"a mask names the group {name!r}, which the model does not have")
        group = known[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (group.n_channels,):
            raise InputError(
                f"the mask of {name} must be bool with {group.n_channels} entries, one a channel of its group, "
                f"got {_described(mask)}"
            )
        keep: list[bool] = mask.tolist()
        if not any(keep) and not group.bypass:
            raise InputError(f"the mask of {name} keeps no channel; a layer must not be emptied")
        if group.frozen and not all(keep):
            raise InputError(f"the mask of {name} removes channels, but the group is frozen: {group.frozen}")
        decided.append(GroupCut(name, group.n_channels, tuple(c for c, bit in enumerate(keep) if bit)))
        if all(keep):
            continue
        if group.bypass:
            blocks.append(BlockCut(group.bypass, tuple(member.tensor for member in group.penalised)))
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
    return PrunePlan(cuts, tuple(decided), groups.input_shapes, tuple(sorted(rewrites)), tuple(blocks))


def _described(mask: object) -> str:
    if not isinstance(mask, Tensor):
        return f"{type(mask).__name__}; give a tensor"
    return f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}"


def compose(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """One plan that does to a model what applying `first`, and `second` to the model it leaves, would do.

    `second` was made for the cut model; positions of the result are those of the uncut one. Its `groups` speak of
    the uncut model as well: a group of both plans lists what stays after both. A group of one plan alone is listed as
    it is there. One that the second plan found with another number of channels than the first left (units may join
    or part when something else goes) is not listed: `cuts` say in any case what goes. The result has the input
    shapes of `first`.

    Constants of dead channels are folded at one cut instead of two: as long as every one of them can be folded the
    outputs are the same, though other biases or columns may hold them. Raises InputError if a tensor has not the
    size in `second` that `first` leaves.
    """
    earlier = {(cut.tensor, cut.dim): cut for cut in first.cuts}
    cuts = dict(earlier)
    for cut in second.cuts:
        key = (cut.tensor, cut.dim)
        if key in earlier:
            cuts[key] = _cut_twice(earlier[key], cut)
        elif not _is_bias_of_a_fold(cut, earlier):
            cuts[key] = cut
    # A place of both plans gets what the second writes there.
    rewrites = {replace(place, size=-1): place for place in (*first.rewrites, *second.rewrites)}
    blocks = (*first.blocks, *second.blocks)

    def stays(name: str) -> bool:
        return not any(block.holds(name) for block in blocks)

    return PrunePlan(
        tuple(cut for _, cut in sorted(cuts.items()) if stays(cut.tensor)),
        _groups_of_both(first.groups, second.groups),
        first.input_shapes,
        tuple(sorted(place for place in rewrites.values() if stays(place.module))),
        tuple(sorted(blocks, key=lambda block: block.module)),
    )


def _cut_twice(first: TensorCut, second: TensorCut) -> TensorCut:
    size = len(second.keep) + len(second.drop)
    if size != len(first.keep):
        raise InputError(
            f"the second plan does not fit the first: it needs {first.tensor} of size {size} in dimension "
            f"{first.dim}, the first leaves {len(first.keep)}; compose a plan with one made for the model it gives"
        )
    gone = (first.keep[position] for position in second.drop)
    return replace(
        first,
        keep=tuple(first.keep[position] for position in second.keep),
        drop=tuple(sorted((*first.drop, *gone))),
    )


def _is_bias_of_a_fold(cut: TensorCut, earlier: Mapping[tuple[str, int], TensorCut]) -> bool:
    """Whether the first cut made the bias, for constants: it took rows of the layer's weight, and of no bias."""
    layer, _, name = cut.tensor.rpartition("bias")
    rows = (earlier.get((f"{layer}weight", dim)) for dim in (0, 1))
    return not name and any(row is not None and row.role == "producer" for row in rows)


def _groups_of_both(first: tuple[GroupCut, ...], second: tuple[GroupCut, ...]) -> tuple[GroupCut, ...]:
    merged = {group.name: group for group in first}
    for group in second:
        before = merged.get(group.name)
        if before is None:
            merged[group.name] = group
        elif group.n_channels == len(before.kept):
            kept = tuple(before.kept[channel] for channel in group.kept)
            merged[group.name] = replace(before, kept=kept)
        else:
            del merged[group.name]
    return tuple(group for _, group in sorted(merged.items()))
