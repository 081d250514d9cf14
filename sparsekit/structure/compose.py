"""Composing two plans into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from sparsekit.errors import InputError
from sparsekit.structure.plan import GroupCut, PrunePlan, TensorCut


def compose(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """Return one plan that does what applying `first`, and then `second` to the cut model, would do.

    Positions of the result, and its input shapes, are those of the uncut model. A group of both plans lists the
    channels that stay after both; a group of one plan is listed as it is there. A group is not listed if `second` has
    it with another number of channels than `first` leaves, which happens when units join or part; `cuts` are complete
    in any case.

    Constants of dead channels are folded once instead of twice. If all can be folded the outputs are the same, though
    other biases or columns may hold them. Raises InputError if a tensor in `second` has not the size that `first`
    leaves.
    """
    earlier = {(cut.tensor, cut.dim): cut for cut in first.cuts}
    cuts = dict(earlier)
    for cut in second.cuts:
        key = (cut.tensor, cut.dim)
        if key in earlier:
            cuts[key] = _cut_twice(earlier[key], cut)
        elif not _is_bias_of_a_fold(cut, earlier):
            cuts[key] = cut
    # A place that both plans rewrite gets what the second writes.
    rewrites = {replace(place, size=-1): place for place in (*first.rewrites, *second.rewrites)}
    blocks = (*first.blocks, *second.blocks)

    def stays(name: str) -> bool:
        return not any(block.holds(name) for block in blocks)

    return PrunePlan(
        tuple(cut for _, cut in sorted(cuts.items()) if stays(cut.tensor)),
        _groups_of_both(first.groups, second.groups),
        first.inputs,
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

    def before(positions: Iterable[int]) -> tuple[int, ...]:
        return tuple(first.keep[position] for position in positions)

    return replace(
        first,
        keep=before(second.keep),
        drop=tuple(sorted((*first.drop, *before(second.drop)))),
        silenced=tuple(sorted((*first.silenced, *before(second.silenced)))),
    )


def _is_bias_of_a_fold(cut: TensorCut, earlier: Mapping[tuple[str, int], TensorCut]) -> bool:
    """Whether the first cut made this bias to fold constants: it cut rows of the layer's weight, but no bias."""
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
