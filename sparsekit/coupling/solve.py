"""Which atoms can only go together, and which must stay, follows from what one traced pass showed.

Atoms that were seen to go together are put into components. Then three requirements are enforced until nothing
changes. Of a grid only whole slices can go. A coarse label goes when all that it covers goes. An attribute has one
value wherever it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sparsekit.coupling.labels import FIXED
from sparsekit.coupling.observations import Atoms, Observations, unique_pairs
from sparsekit.structure.places import Attribute


@dataclass(frozen=True)
class Coupled:
    """The solution.

    component: (n_atoms,), the component of each atom. reasons: why a component must stay, for those that must. sizes:
    for each attribute that shrinks, the component of each index of the dimension it sizes.
    """

    component: Atoms
    reasons: dict[int, str]
    sizes: dict[Attribute, Atoms]


def solve(seen: Observations) -> Coupled:
    """Find the components that satisfy every requirement, and say which must stay."""
    edges = [np.zeros((0, 2), np.int64), *seen.edges]
    fixed = list(seen.fixed)
    while True:
        component = _components(seen.n_atoms, edges)
        more = [*_whole_slices(seen, component), *_covered(seen, component), *_one_value(seen, component)]
        more = [pair for pair in more if len(pair)]
        if not more:
            break
        edges += more
    for atoms in edges:
        touching = atoms[(atoms == FIXED).any(1)]
        if touching.size:
            fixed.append((np.unique(touching[touching != FIXED]), "it meets a tensor whose size is fixed"))
    fixed += _left_over(seen, component)
    fixed += _unsizable(seen, component)
    reasons: dict[int, str] = {}
    for atoms, reason in fixed:
        for number in np.unique(component[atoms[atoms != FIXED]]).tolist():
            reasons.setdefault(number, reason)
    return Coupled(component, reasons, _sizes(seen, component))


def _components(n_atoms: int, edges: list[Atoms]) -> Atoms:
    pairs = np.concatenate(edges)
    pairs = pairs[(pairs != FIXED).all(1)]  # through FIXED everything would hang together
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), (n_atoms, n_atoms))
    labels: Atoms = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def _whole_slices(seen: Observations, component: Atoms) -> Iterator[Atoms]:
    """Pairs that make every component fill whole slices of each grid, along one of its dimensions.

    If none is whole yet, it is the dimension that leaves the most components.
    """
    for key, atoms in list(seen.grids.items()):
        found = component[atoms]
        sliced = [np.moveaxis(found, dim, 0).reshape(found.shape[dim], -1) for dim in range(found.ndim)]
        if any(bool((rows == rows[:, :1]).all()) for rows in sliced):
            if (found == found.flat[0]).all():
                del seen.grids[key]  # one component only gets larger
            continue
        best = max(range(found.ndim), key=lambda dim: _count(sliced[dim]))
        rows = np.moveaxis(atoms, best, 0).reshape(atoms.shape[best], -1)
        yield unique_pairs(np.broadcast_to(rows[:, :1], rows.shape), rows)


def _count(rows: Atoms) -> int:
    """How many components remain when everything in a row goes together."""
    pairs = np.stack([np.broadcast_to(rows[:, :1], rows.shape).ravel(), rows.ravel()], 1)
    values, pairs = np.unique(pairs, return_inverse=True)
    pairs = pairs.reshape(-1, 2)
    n = len(values)
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), (n, n))
    return int(connected_components(graph, directed=False)[0])


def _covered(seen: Observations, component: Atoms) -> Iterator[Atoms]:
    """Pairs of a coarse label and a row that it covers, where the row is one component."""
    for coarse, fine in seen.covers:
        rows = component[fine]
        together = (rows == rows[:, :1]).all(1) & (component[coarse] != rows[:, 0])
        if together.any():
            yield unique_pairs(coarse[together], fine[together, 0])


def _left_over(seen: Observations, component: Atoms) -> list[tuple[Atoms, str]]:
    """Coarse labels that several components share: they stay, whichever of those go."""
    shared = []
    for coarse, fine in seen.covers:
        rows = component[fine]
        several = (rows != rows[:, :1]).any(1)
        if several.any():
            shared.append((coarse[several], "it is shared by channels that can go on their own"))
    return shared


def _uses(
    seen: Observations, component: Atoms, *, silent: bool = False
) -> Iterator[tuple[Attribute, list[Atoms | None]]]:
    """For each attribute, one atom a slice for each dimension it sizes; None for a dimension that cannot shrink.

    `silent` adds attributes that the pass did not read.
    """
    by_attribute: dict[Attribute, list[Atoms | None]] = {}
    read = {use.attribute for use in seen.sizes if not use.silent}
    for use in seen.sizes:
        if use.silent and (not silent or use.attribute in read):
            continue
        slices = use.slices
        if slices is not None:
            found = component[slices]
            whole = (found == found[:, :1]).all() and len(np.unique(found[:, 0])) > 1
            slices = slices[:, 0] if whole else None
        by_attribute.setdefault(use.attribute, []).append(slices)
    yield from by_attribute.items()


def _one_value(seen: Observations, component: Atoms) -> Iterator[Atoms]:
    """Pairs that make all dimensions of one attribute shrink together, index by index."""
    for _, uses in _uses(seen, component):
        shrinking = [use for use in uses if use is not None]
        for other in shrinking[1:]:
            first = shrinking[0]
            if len(other) == len(first) and not np.array_equal(component[first], component[other]):
                yield unique_pairs(first, other)


def _unsizable(seen: Observations, component: Atoms) -> list[tuple[Atoms, str]]:
    """Atoms whose attribute also sizes a dimension that cannot shrink: they stay."""
    stuck = []
    for attribute, uses in _uses(seen, component):
        shrinking = [use for use in uses if use is not None]
        if shrinking and len(shrinking) < len(uses):
            reason = f"{attribute} also sizes something that has to stay"
            stuck.append((np.concatenate(shrinking), reason))
    return stuck


def _sizes(seen: Observations, component: Atoms) -> dict[Attribute, Atoms]:
    sizes = {}
    for attribute, uses in _uses(seen, component, silent=True):
        if uses and all(use is not None for use in uses) and uses[0] is not None:
            sizes[attribute] = component[uses[0]]
    return sizes
