"""Solving hand-made and random observations: requirements hold, nothing more is coupled, order does not count."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit.coupling import observations
from sparsekit.coupling.labels import FIXED
from sparsekit.coupling.observations import Atoms, Observations, SizeUse, unique_pairs
from sparsekit.coupling.solve import Coupled, solve
from sparsekit.structure.places import Attribute

HEADS = Attribute("attention", "num_heads")
Partition = set[frozenset[int]]


def atoms(*values: int) -> Atoms:
    return np.array(values, np.int64)


def axis(seen: Observations, name: str, size: int) -> Tensor:
    """Labels of a new axis."""
    first = seen.add_axis(name, 0, size).first
    return torch.arange(first, first + size, dtype=torch.float32)


def partition(coupled: Coupled) -> Partition:
    """The components as sets of atoms."""
    members: dict[int, set[int]] = {}
    for atom, number in enumerate(coupled.component.tolist()):
        if atom != FIXED:
            members.setdefault(number, set()).add(atom)
    return {frozenset(one) for one in members.values()}


def united(n_atoms: int, pairs: Iterable[tuple[int, int]]) -> Partition:
    """Reference: sets are joined one pair at a time."""
    sets = {atom: frozenset([atom]) for atom in range(1, n_atoms)}
    for one, other in pairs:
        both = sets[one] | sets[other]
        sets.update(dict.fromkeys(both, both))
    return set(sets.values())


def frozen(coupled: Coupled) -> dict[int, str]:
    """The reason of every atom that must stay."""
    return {
        atom: coupled.reasons[number]
        for atom, number in enumerate(coupled.component.tolist())
        if atom != FIXED and number in coupled.reasons
    }


def random_edges(
    seen: Observations, labels: Tensor, count: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    flat = labels.flatten()
    pairs = flat[torch.randint(len(flat), (2, count), generator=generator)]
    seen.couple(pairs[0], pairs[1])
    return [(int(one), int(other)) for one, other in pairs.T.tolist()]


# ------------------------------------------------------------------------------------------ what was seen


@pytest.mark.parametrize("seed", range(10))
def test_without_requirements_exactly_what_was_seen_together_goes_together(seed: int) -> None:
    seen, generator = Observations(), torch.Generator().manual_seed(seed)
    labels = axis(seen, "weight", 40)
    pairs = random_edges(seen, labels, 15, generator) + random_edges(seen, labels, 10, generator)
    assert partition(solve(seen)) == united(seen.n_atoms, pairs)


def test_shapes_are_broadcast_where_labels_meet() -> None:
    seen = Observations()
    rows, single = axis(seen, "rows", 6).reshape(3, 2), axis(seen, "single", 3).reshape(3, 1)
    seen.couple(rows, single)
    assert partition(solve(seen)) == {frozenset({1, 2, 7}), frozenset({3, 4, 8}), frozenset({5, 6, 9})}


@pytest.mark.parametrize("seed", range(3))
def test_large_arrays_that_repeat_themselves_are_coupled_as_if_nothing_were_left_out(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    for large in (observations._LARGE, 10**9):
        monkeypatch.setattr(observations, "_LARGE", large)
        seen, generator = Observations(), torch.Generator().manual_seed(seed)
        windows = axis(seen, "windows", 12)[torch.randint(12, (4, 1, 3, 1), generator=generator)]
        channels = axis(seen, "channels", 24)[torch.randint(24, (1, 5, 3, 1), generator=generator)]
        seen.couple(windows.expand(4, 5, 3, 300), channels.expand(4, 5, 3, 300))
        table = axis(seen, "fine", 6)[torch.randint(6, (3, 2, 1), generator=generator)]
        seen.cover(axis(seen, "coarse", 3).reshape(3, 1, 1), table.expand(3, 2, 2000).clone())
        seen.grid(axis(seen, "grid", 12).reshape(3, 4, 1).expand(3, 4, 1000).clone())
        solved.append(partition(solve(seen)))
    assert solved[0] == solved[1]


def test_an_atom_is_an_index_of_its_axis() -> None:
    seen = Observations()
    for size in (3, 1, 5):
        axis(seen, f"of size {size}", size)
    found = [seen.axis_of(atom).size for atom in range(1, seen.n_atoms)]
    assert found == [3, 3, 3, 1, 5, 5, 5, 5, 5]


def test_every_pair_of_different_atoms_is_counted_once() -> None:
    pairs = unique_pairs(atoms(3, 1, 2, 1, 5), atoms(1, 3, 2, 3, FIXED))
    assert pairs.tolist() == [[0, 5], [1, 3]]


def test_roles_and_traits_are_collected_in_order() -> None:
    seen = Observations()
    assert seen.noted("gate").tolist() == []
    seen.note("gate", torch.tensor([[4.0, 2.0]]))
    seen.note("gate", atoms(2, 9))
    assert seen.noted("gate").tolist() == [2, 4, 9]
    assert seen.noted("consumer").tolist() == []


# ---------------------------------------------------------------------------------------------- what stays


def test_nothing_is_coupled_through_what_belongs_to_nothing() -> None:
    seen = Observations()
    free, one, other = axis(seen, "free", 2), axis(seen, "one", 3), axis(seen, "other", 3)
    padded = torch.tensor([float(FIXED), float(FIXED), float(FIXED)])
    seen.couple(one, padded)
    seen.couple(other, padded)
    coupled = solve(seen)
    assert partition(coupled) == united(seen.n_atoms, ())
    assert frozen(coupled) == dict.fromkeys(range(3, 9), "it meets a tensor whose size is fixed")
    assert int(free[0]) not in frozen(coupled)


def test_what_is_coupled_with_what_must_stay_stays_and_the_first_reason_is_given() -> None:
    seen = Observations()
    one, other = axis(seen, "one", 3), axis(seen, "other", 3)
    seen.fix(other[:2], "it reaches the output")
    seen.fix(one[1:], "it is mixed")
    seen.couple(one, other)
    assert frozen(solve(seen)) == {
        1: "it reaches the output",
        4: "it reaches the output",
        2: "it reaches the output",
        5: "it reaches the output",
        3: "it is mixed",
        6: "it is mixed",
    }


def test_what_belongs_to_nothing_gets_no_reason_of_its_own() -> None:
    seen = Observations()
    axis(seen, "one", 2)
    seen.fix(torch.tensor([float(FIXED)]), "it is padded")
    assert solve(seen).reasons == {}


# ----------------------------------------------------------------------------------------- whole slices


def subsets(numbers: list[int], generator: torch.Generator) -> Iterable[set[int]]:
    for _ in range(20):
        yield {number for number in numbers if torch.rand((), generator=generator) < 0.4}


def is_whole(kept: np.ndarray) -> bool:
    """Whether True entries are all combinations of some indices of each dimension."""
    dims = range(kept.ndim)
    sides = [kept.any(axis=tuple(d for d in dims if d != dim), keepdims=True) for dim in dims]
    return bool((kept == functools.reduce(np.logical_and, sides)).all())


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (3, 3), (2, 3, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_goes_from_a_grid_leaves_a_grid(shape: tuple[int, ...], seed: int) -> None:
    seen, generator = Observations(), torch.Generator().manual_seed(seed)
    first = axis(seen, "first", int(np.prod(shape))).reshape(shape)
    second = first.permute(*reversed(range(len(shape))))
    third = axis(seen, "third", 6).reshape(3, 2)
    for grid in (first, second, third):
        seen.grid(grid)
    random_edges(seen, torch.cat([first.flatten(), third.flatten()]), seed, generator)
    coupled = solve(seen)
    for gone in subsets(sorted(set(coupled.component.tolist())), generator):
        for grid in (first, second, third):
            kept = ~np.isin(coupled.component[grid.numpy().astype(np.int64)], list(gone))
            assert is_whole(kept)


@pytest.mark.parametrize(("shape", "units"), [((2, 4), 4), ((4, 2), 4), ((3, 3), 3), ((5, 2, 3), 5)])
def test_a_grid_is_cut_along_the_dimension_that_leaves_the_most_units(
    shape: tuple[int, ...], units: int
) -> None:
    seen = Observations()
    seen.grid(axis(seen, "grid", int(np.prod(shape))).reshape(shape))
    assert len(partition(solve(seen))) == units


def test_a_grid_follows_what_is_coupled_already() -> None:
    seen = Observations()
    grid = axis(seen, "grid", 8).reshape(2, 4)
    seen.grid(grid)
    seen.couple(grid[:, :1], grid)  # whole rows: the two heads
    assert len(partition(solve(seen))) == 2
    seen.couple(grid[:1, :1], grid)
    assert len(partition(solve(seen))) == 1


def test_labels_along_one_dimension_are_no_grid() -> None:
    seen = Observations()
    seen.grid(axis(seen, "vector", 6).reshape(1, 6, 1))
    assert not seen.grids


# ----------------------------------------------------------------------------------------------- covers


def test_a_coarse_label_goes_with_all_that_it_covers() -> None:
    seen = Observations()
    heads, widths = axis(seen, "heads", 3).reshape(3, 1), axis(seen, "widths", 6).reshape(3, 2)
    seen.cover(heads, widths)
    seen.couple(widths[:, :1], widths)
    assert partition(solve(seen)) == {frozenset({1, 4, 5}), frozenset({2, 6, 7}), frozenset({3, 8, 9})}


def test_a_coarse_label_that_several_share_stays_and_they_stay_free() -> None:
    seen = Observations()
    heads, widths = axis(seen, "heads", 3).reshape(3, 1), axis(seen, "widths", 6).reshape(3, 2)
    seen.cover(heads, widths)
    coupled = solve(seen)
    assert partition(coupled) == united(seen.n_atoms, ())
    reason = "it is shared by channels that can go on their own"
    assert frozen(coupled) == dict.fromkeys((1, 2, 3), reason)


def test_what_a_cover_couples_can_complete_another_cover() -> None:
    seen = Observations()
    fine, middle, coarse = axis(seen, "fine", 8), axis(seen, "middle", 4), axis(seen, "coarse", 2)
    seen.cover(coarse.reshape(2, 1), middle.reshape(2, 2))
    seen.cover(middle.reshape(4, 1), fine.reshape(4, 2))
    seen.couple(fine.reshape(2, 4)[:, :1], fine.reshape(2, 4))
    assert sorted(len(one) for one in partition(solve(seen))) == [7, 7]


# ------------------------------------------------------------------------------------------- attributes


def use(labels: Tensor | None, attribute: Attribute = HEADS, *, silent: bool = False) -> SizeUse:
    """The attribute gives the number of rows of `labels`."""
    slices = None if labels is None else labels.numpy().astype(np.int64).reshape(len(labels), -1)
    return SizeUse(attribute, slices, silent)


def test_an_attribute_has_one_value_wherever_it_is_used() -> None:
    seen = Observations()
    queries, values = axis(seen, "queries", 4), axis(seen, "values", 4)
    seen.sizes += [use(queries), use(values)]
    coupled = solve(seen)
    assert partition(coupled) == {frozenset({i, i + 4}) for i in range(1, 5)}
    assert coupled.sizes[HEADS].tolist() == coupled.component[queries.long().numpy()].tolist()


def test_different_attributes_do_not_couple_what_they_size() -> None:
    seen = Observations()
    seen.sizes += [use(axis(seen, "a", 3)), use(axis(seen, "b", 3), Attribute("attention", "other"))]
    coupled = solve(seen)
    assert len(partition(coupled)) == 6
    assert len(coupled.sizes) == 2


def test_an_attribute_that_also_sizes_something_else_keeps_what_it_sizes() -> None:
    seen = Observations()
    seen.sizes += [use(axis(seen, "heads", 3)), use(None)]
    coupled = solve(seen)
    assert set(frozen(coupled).values()) == {"attention.num_heads also sizes something that has to stay"}
    assert len(frozen(coupled)) == 3
    assert coupled.sizes == {}


def test_an_attribute_of_a_dimension_that_is_cut_inside_does_not_shrink() -> None:
    seen = Observations()
    grid = axis(seen, "grid", 8).reshape(2, 4)
    seen.grid(grid)  # goes by columns, so that the attribute of its rows stays
    seen.sizes.append(use(grid))
    coupled = solve(seen)
    assert len(partition(coupled)) == 4
    assert coupled.sizes == {}
    assert coupled.reasons == {}


def test_what_an_attribute_declares_is_sized_and_couples_nothing() -> None:
    seen = Observations()
    one, other = axis(seen, "one", 3), axis(seen, "other", 3)
    width = Attribute("", "num_features")
    seen.sizes += [use(one, width, silent=True)]
    coupled = solve(seen)
    assert coupled.sizes[width].tolist() == coupled.component[one.long().numpy()].tolist()
    seen.sizes += [use(other, width, silent=True)]
    assert len(partition(solve(seen))) == 6


# ------------------------------------------------------------------------------------------------ order


def random_observations(seed: int, order: Callable[[list[int]], list[int]]) -> Observations:
    """Observations of all kinds, noted in an order of the caller's."""
    seen, generator = Observations(), torch.Generator().manual_seed(seed)
    grids = [
        axis(seen, f"grid {i}", 12).reshape(shape) for i, shape in enumerate([(3, 4), (2, 6), (2, 3, 2)])
    ]
    coarse = axis(seen, "coarse", 3).reshape(3, 1)
    flat = torch.cat([grid.flatten() for grid in grids])
    notes: list[Callable[[], object]] = [
        *(lambda grid=grid: seen.grid(grid) for grid in grids),
        lambda: seen.cover(coarse, grids[0]),
        lambda: seen.sizes.append(use(grids[1].T)),
        lambda: seen.sizes.append(use(grids[2].reshape(6, 2))),
        lambda: seen.fix(flat[seed : seed + 1], "it reaches the output"),
    ]
    for _ in range(seed % 5):
        pair = flat[torch.randint(len(flat), (2,), generator=generator)]
        notes.append(lambda pair=pair: seen.couple(pair[:1], pair[1:]))
    for number in order(list(range(len(notes)))):
        notes[number]()
    return seen


@pytest.mark.parametrize("seed", range(15))
def test_the_solution_does_not_depend_on_the_order_of_what_was_seen(seed: int) -> None:
    orders: list[Callable[[list[int]], list[int]]] = [
        lambda numbers: numbers,
        lambda numbers: numbers[::-1],
        lambda numbers: numbers[1::2] + numbers[::2],
    ]
    solved = [solve(random_observations(seed, order)) for order in orders]
    for one, other in itertools.pairwise(solved):
        assert partition(one) == partition(other)
        assert frozen(one).keys() == frozen(other).keys()


@pytest.mark.parametrize("seed", range(15))
def test_a_solution_satisfies_every_requirement_at_once(seed: int) -> None:
    seen = random_observations(seed, lambda numbers: numbers)
    grids = [grid.copy() for grid in seen.grids.values()]
    coupled = solve(seen)
    free = sorted(set(coupled.component[1:].tolist()) - coupled.reasons.keys())
    for gone in subsets(free, torch.Generator().manual_seed(seed)):
        kept = ~np.isin(coupled.component, list(gone))
        assert all(is_whole(kept[grid]) for grid in grids)
        for coarse, fine in seen.covers:
            assert (kept[coarse] == kept[fine].any(1)).all()
        for attribute, numbers in coupled.sizes.items():
            sized = [
                one.slices for one in seen.sizes if one.attribute == attribute and one.slices is not None
            ]
            values = {int(kept[slices].any(1).sum()) for slices in sized}
            assert values == {int((~np.isin(numbers, list(gone))).sum())}
