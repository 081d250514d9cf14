"""What one forward pass showed about channels, as arrays of atoms: what goes together, what must stay, what sizes what.

An atom is one index along one dimension of one parameter or buffer. Nothing is decided here; `coupling` does that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparsekit.coupling.labels import span
from sparsekit.structure.groups import Role
from sparsekit.structure.places import Attribute, Place

Atoms = NDArray[np.int64]
# What is no role of a member and yet counts: a factor scales a product, a gate scales it by a squashed value.
Trait = Literal["factor", "gate"]


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor; its atoms are `first` ... `first + size - 1`."""

    tensor: str
    dim: int
    size: int
    first: int


@dataclass(frozen=True)
class SizeUse:
    """An attribute gave the size of a dimension whose slices have these labels; None where they have none.

    `silent`: the pass did not read the attribute; it says by its name that it is this size.
    """

    attribute: Attribute
    slices: Atoms | None
    silent: bool = False


@dataclass
class Observations:
    """Everything observed, in the order of the forward pass.

    edges: pairs of atoms that go together. grids: labels over several dimensions of one tensor, of which only whole
    slices can go. covers: (coarse, fine) where entry b of `coarse` runs through all of row b of `fine`.
    fixed: atoms that must stay, and why. sizes: attributes as sizes. places: where code computes the size of a
    dimension with these atoms. norms: layer -> what reads its output, a
    normalisation's weight or "" for anything else.
    """

    axes: list[Axis] = field(default_factory=list)
    edges: list[Atoms] = field(default_factory=list)
    grids: dict[bytes, Atoms] = field(default_factory=dict)
    covers: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    fixed: list[tuple[Atoms, str]] = field(default_factory=list)
    sizes: list[SizeUse] = field(default_factory=list)
    places: list[tuple[Place, Atoms]] = field(default_factory=list)
    norms: dict[str, set[str]] = field(default_factory=dict)
    notes: dict[Role | Trait, list[Atoms]] = field(default_factory=dict)
    n_atoms: int = 1  # number 0 is FIXED

    def add_axis(self, tensor: str, dim: int, size: int) -> Axis:
        """Number the indices of a dimension."""
        axis = Axis(tensor, dim, size, self.n_atoms)
        self.axes.append(axis)
        self.n_atoms += size
        return axis

    def axis_of(self, atom: int) -> Axis:
        """The dimension an atom is an index of."""
        return self.axes[bisect_right(self.axes, atom, key=lambda axis: axis.first) - 1]

    def couple(self, first: Tensor, second: Tensor) -> None:
        """Elements at the same place go together; shapes broadcast."""
        pairs = np.stack(np.broadcast_arrays(to_atoms(first), to_atoms(second)))
        if pairs.size > _LARGE:
            pairs = _distinct_slices(pairs, range(1, pairs.ndim))
        edges = unique_pairs(pairs[0], pairs[1])
        if edges.size:
            self.edges.append(edges)

    def cover(self, coarse: Tensor, fine: Tensor) -> None:
        """An entry of `coarse` stays as long as anything in its row of `fine` (more dimensions) does."""
        dims = span(coarse)
        rows = to_atoms(fine).transpose(*dims, *(d for d in range(fine.dim()) if d not in dims))
        n = int(np.prod([coarse.shape[d] for d in dims]))
        table = np.concatenate([to_atoms(coarse).reshape(n, 1), rows.reshape(n, -1)], 1)
        if table.size > _LARGE:
            table = _distinct_slices(table, (0,))
            table = np.concatenate([table[:, :1], _distinct_slices(table[:, 1:], (1,))], 1)
        self.covers.append((table[:, 0], table[:, 1:]))

    def grid(self, labels: Tensor) -> None:
        """Note labels that vary along more than one dimension."""
        if len(span(labels)) > 1:
            atoms = to_atoms(labels.squeeze())
            if atoms.size > _LARGE:
                atoms = _distinct_slices(atoms, range(atoms.ndim))
            self.grids[repr(atoms.shape).encode() + atoms.tobytes()] = atoms

    def fix(self, labels: Tensor, reason: str) -> None:
        """These atoms must stay."""
        self.fixed.append((np.unique(to_atoms(labels)), reason))

    def note(self, what: Role | Trait, labels: Tensor | Atoms) -> None:
        """These atoms have this role or trait."""
        atoms = labels if isinstance(labels, np.ndarray) else to_atoms(labels)
        self.notes.setdefault(what, []).append(np.unique(atoms))

    def noted(self, what: Role | Trait) -> Atoms:
        """All atoms of this role or trait, ascending."""
        arrays = self.notes.get(what)
        return np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)


# Arrays above this size are thinned out before they are sorted: windows and patches repeat the same labels.
_LARGE = 10_000


def _distinct_slices(atoms: Atoms, axes: Iterable[int]) -> Atoms:
    """The array without slices that are equal to an earlier one, along each of `axes`."""
    generator = np.random.default_rng(0)
    for axis in axes:
        slices = np.moveaxis(atoms, axis, 0).reshape(atoms.shape[axis], -1)
        # Equal slices have equal sums; different ones the same with a probability of about 1e-12.
        _, first = np.unique(slices @ generator.random(slices.shape[1]), return_index=True)
        atoms = atoms.take(np.sort(first), axis)
    return atoms


def unique_pairs(first: Atoms, second: Atoms) -> Atoms:
    """(n, 2): each pair of different atoms once, the smaller one first."""
    low, high = np.minimum(first, second).ravel(), np.maximum(first, second).ravel()
    codes = np.unique((low << 32 | high)[low != high])
    return np.stack([codes >> 32, codes & 0xFFFFFFFF], 1)


def to_atoms(labels: Tensor) -> Atoms:
    """Labels as whole numbers."""
    atoms: Atoms = labels.numpy().astype(np.int64)
    return atoms


def joined(parts: Iterable[Atoms | None]) -> Atoms | None:
    """All atoms of several arrays, or None if there are none."""
    arrays = [part.ravel() for part in parts if part is not None]
    return np.unique(np.concatenate(arrays)) if arrays else None
