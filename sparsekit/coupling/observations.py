"""What one forward pass showed about channels, as arrays of atoms. Nothing is decided here: `solve` does that.

The words of this room:

    atom        one index along one dimension of one parameter or buffer, as a number; 0 (`FIXED`) stands for none
    axis        one dimension of one parameter or buffer; its atoms have consecutive numbers
    label       the atom that an element of a tensor belongs to
    span        the dimensions along which labels vary
    grid        labels that span several dimensions; only whole slices of it can go
    cover       a coarse label (a head) over a row of finer ones (its entries): it goes when all of them go
    component   atoms that can only go together, numbered by `solve`
    role        what a tensor is to the channels: "producer", "consumer", "norm", ... (`structure.groups.Role`)
    trait       what is no role and yet counts: "factor", "gate", "summed"
    place       a size in the code of the model: an argument of a reshape

An example: the second convolution reads, by its columns (atoms 10 and 11), what the rows of the first (atoms 1 and 2)
produce. So these go together, as two components that can go one by one. The others have to stay.

    >>> import torch
    >>> from sparsekit.evaluation import as_inputs
    >>> from sparsekit.coupling.solve import solve
    >>> from sparsekit.coupling.trace import trace
    >>> first, second = torch.nn.Conv2d(3, 2, 1, bias=False), torch.nn.Conv2d(2, 4, 1, bias=False)
    >>> seen = trace(torch.nn.Sequential(first, torch.nn.ReLU(), second), as_inputs(torch.zeros(1, 3, 8, 8))).seen
    >>> [(axis.tensor, axis.dim, axis.first, axis.size) for axis in seen.axes]
    [('0.weight', 0, 1, 2), ('0.weight', 1, 3, 3), ('2.weight', 0, 6, 4), ('2.weight', 1, 10, 2)]
    >>> seen.noted("producer").tolist(), seen.noted("consumer").tolist()
    ([1, 2, 6, 7, 8, 9], [3, 4, 5, 10, 11])
    >>> solve(seen).component.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    >>> solve(seen).reasons[3], solve(seen).reasons[6]
    ('it reads channels whose number is fixed', "it reaches the model's output")
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
# A factor is a weight in a product. A gate makes what a sigmoid or softmax squashes and another value is scaled by.
# What is summed is added up with other channels.
Trait = Literal["factor", "gate", "summed"]


# The tensor of axes that are none of the model's: a forward pass makes it new, in a size that an attribute gives.
MADE = ""


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor; its atoms are `first` ... `first + size - 1`. See `MADE`."""

    tensor: str
    dim: int
    size: int
    first: int


@dataclass(frozen=True)
class SizeUse:
    """An attribute sizes a dimension.

    slices: (size, n), the atoms of each slice of the dimension, None if it has none. silent: the pass did not read
    the attribute, its name says what it sizes.
    """

    attribute: Attribute
    slices: Atoms | None
    silent: bool = False


@dataclass
class Observations:
    """Everything that was seen, in the order of the forward pass.

    edges: each (n, 2), pairs of atoms that go together. grids: by shape and content, each once. covers: (coarse,
    fine), where atom b of `coarse` covers row b of `fine`. fixed: atoms that must stay, and why. places: where code
    computes the size of a dimension, and the atoms of this dimension. quotients: where code needs another text once an
    attribute changes, because it divides by it. norms: for the weight of a layer, what reads the layer's output: the
    weight of a normalisation, or "" for anything else. notes: the atoms of each role and trait. n_atoms: one more than
    the largest atom.
    """

    axes: list[Axis] = field(default_factory=list)
    edges: list[Atoms] = field(default_factory=list)
    grids: dict[bytes, Atoms] = field(default_factory=dict)
    covers: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    fixed: list[tuple[Atoms, str]] = field(default_factory=list)
    sizes: list[SizeUse] = field(default_factory=list)
    places: list[tuple[Place, Atoms]] = field(default_factory=list)
    quotients: dict[Place, Attribute] = field(default_factory=dict)
    norms: dict[str, set[str]] = field(default_factory=dict)
    notes: dict[Role | Trait, list[Atoms]] = field(default_factory=dict)
    n_atoms: int = 1  # 0 is FIXED

    def add_axis(self, tensor: str, dim: int, size: int) -> Axis:
        """Number the indices of a dimension as atoms."""
        axis = Axis(tensor, dim, size, self.n_atoms)
        self.axes.append(axis)
        self.n_atoms += size
        return axis

    def axis_of(self, atom: int) -> Axis:
        """The axis that an atom belongs to."""
        return self.axes[bisect_right(self.axes, atom, key=lambda axis: axis.first) - 1]

    def couple(self, first: Tensor, second: Tensor) -> None:
        """Note that atoms at the same index of both arrays go together; shapes broadcast."""
        pairs = np.stack(np.broadcast_arrays(to_atoms(first), to_atoms(second)))
        if pairs.size > _LARGE:
            pairs = _distinct_slices(pairs, range(1, pairs.ndim))
        edges = unique_pairs(pairs[0], pairs[1])
        if edges.size:
            self.edges.append(edges)

    def cover(self, coarse: Tensor, fine: Tensor) -> None:
        """Note that each atom of `coarse` covers its row of `fine`, which spans more dimensions."""
        dims = span(coarse)
        rows = to_atoms(fine).transpose(*dims, *(d for d in range(fine.dim()) if d not in dims))
        n = int(np.prod([coarse.shape[d] for d in dims]))
        table = np.concatenate([to_atoms(coarse).reshape(n, 1), rows.reshape(n, -1)], 1)
        if table.size > _LARGE:
            table = _distinct_slices(table, (0,))
            table = np.concatenate([table[:, :1], _distinct_slices(table[:, 1:], (1,))], 1)
        self.covers.append((table[:, 0], table[:, 1:]))

    def grid(self, labels: Tensor) -> None:
        """Note labels as a grid, if they span more than one dimension."""
        if len(span(labels)) > 1:
            atoms = to_atoms(labels.squeeze())
            if atoms.size > _LARGE:
                atoms = _distinct_slices(atoms, range(atoms.ndim))
            self.grids[repr(atoms.shape).encode() + atoms.tobytes()] = atoms

    def fix(self, labels: Tensor, reason: str) -> None:
        """Note that these atoms must stay, and why."""
        self.fixed.append((np.unique(to_atoms(labels)), reason))

    def note(self, what: Role | Trait, labels: Tensor | Atoms) -> None:
        """Note that these atoms have this role or trait."""
        atoms = labels if isinstance(labels, np.ndarray) else to_atoms(labels)
        self.notes.setdefault(what, []).append(np.unique(atoms))

    def noted(self, what: Role | Trait) -> Atoms:
        """All atoms of this role or trait, ascending."""
        arrays = self.notes.get(what)
        return np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)


# Larger arrays are thinned out before they are sorted: windows and patches repeat the same labels.
_LARGE = 10_000


def _distinct_slices(atoms: Atoms, dims: Iterable[int]) -> Atoms:
    """The array without slices that repeat an earlier one, along each of `dims`."""
    generator = np.random.default_rng(0)
    for dim in dims:
        slices = np.moveaxis(atoms, dim, 0).reshape(atoms.shape[dim], -1)
        # Equal slices have equal sums; different ones the same with a probability of about 1e-12.
        _, first = np.unique(slices @ generator.random(slices.shape[1]), return_index=True)
        atoms = atoms.take(np.sort(first), dim)
    return atoms


def unique_pairs(first: Atoms, second: Atoms) -> Atoms:
    """(n, 2): each pair of different atoms once, the smaller one first."""
    low, high = np.minimum(first, second).ravel(), np.maximum(first, second).ravel()
    codes = np.unique((low << 32 | high)[low != high])
    return np.stack([codes >> 32, codes & 0xFFFFFFFF], 1)


def to_atoms(labels: Tensor) -> Atoms:
    """Labels as an array of atoms."""
    atoms: Atoms = labels.numpy().astype(np.int64)
    return atoms


def joined(parts: Iterable[Atoms | None]) -> Atoms | None:
    """All atoms of several arrays, each once, or None if there is no array."""
    arrays = [part.ravel() for part in parts if part is not None]
    return np.unique(np.concatenate(arrays)) if arrays else None
