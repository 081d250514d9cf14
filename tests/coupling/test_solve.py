"""Decisions on hand-made and random facts: requirements hold, nothing more is coupled, and the order does not count."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit.coupling import observations as facts_module
from sparsekit.coupling.labels import FIXED
from sparsekit.coupling.observations import Atoms, Facts, SizeUse, unique_pairs
from sparsekit.coupling.solve import Coupled, decide
from sparsekit.structure.places import Attribute

HEADS = Attribute("attention", "num_heads")
Partition = set[frozenset[int]]


def atoms(*values: int) -> Atoms:
    return np.array(values, np.int64)


def axis(facts: Facts, name: str, size: int) -> Tensor:
    """Labels of a new axis."""
    first = facts.add_axis(name, 0, size).first
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
    facts: Facts, labels: Tensor, count: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    flat = labels.flatten()
    pairs = flat[torch.randint(len(flat), (2, count), generator=generator)]
    facts.couple(pairs[0], pairs[1])
    return [(int(one), int(other)) for one, other in pairs.T.tolist()]


# ------------------------------------------------------------------------------------------ what was seen


@pytest.mark.parametrize("seed", range(10))
def test_without_requirements_exactly_what_was_seen_together_goes_together(seed: int) -> None:
    facts, generator = Facts(), torch.Generator().manual_seed(seed)
    labels = axis(facts, "weight", 40)
    pairs = random_edges(facts, labels, 15, generator) + random_edges(facts, labels, 10, generator)
    assert partition(decide(facts)) == united(facts.n_atoms, pairs)


def test_shapes_are_broadcast_where_labels_meet() -> None:
    facts = Facts()
    rows, single = axis(facts, "rows", 6).reshape(3, 2), axis(facts, "single", 3).reshape(3, 1)
    facts.couple(rows, single)
    assert partition(decide(facts)) == {frozenset({1, 2, 7}), frozenset({3, 4, 8}), frozenset({5, 6, 9})}


@pytest.mark.parametrize("seed", range(3))
def test_large_arrays_that_repeat_themselves_are_coupled_as_if_nothing_were_left_out(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = []
    for large in (facts_module._LARGE, 10**9):
        monkeypatch.setattr(facts_module, "_LARGE", large)
        facts, generator = Facts(), torch.Generator().manual_seed(seed)
        windows = axis(facts, "windows", 12)[torch.randint(12, (4, 1, 3, 1), generator=generator)]
        channels = axis(facts, "channels", 24)[torch.randint(24, (1, 5, 3, 1), generator=generator)]
        facts.couple(windows.expand(4, 5, 3, 300), channels.expand(4, 5, 3, 300))
        table = axis(facts, "fine", 6)[torch.randint(6, (3, 2, 1), generator=generator)]
        facts.cover(axis(facts, "coarse", 3).reshape(3, 1, 1), table.expand(3, 2, 2000).clone())
        facts.grid(axis(facts, "grid", 12).reshape(3, 4, 1).expand(3, 4, 1000).clone())
        decided.append(partition(decide(facts)))
    assert decided[0] == decided[1]


def test_an_atom_is_an_index_of_its_axis() -> None:
    facts = Facts()
    for size in (3, 1, 5):
        axis(facts, f"of size {size}", size)
    found = [facts.axis_of(atom).size for atom in range(1, facts.n_atoms)]
    assert found == [3, 3, 3, 1, 5, 5, 5, 5, 5]


def test_every_pair_of_different_atoms_is_counted_once() -> None:
    pairs = unique_pairs(atoms(3, 1, 2, 1, 5), atoms(1, 3, 2, 3, FIXED))
    assert pairs.tolist() == [[0, 5], [1, 3]]


def test_marks_are_collected_in_order() -> None:
    facts = Facts()
    assert facts.marked("gates").tolist() == []
    facts.mark("gates", torch.tensor([[4.0, 2.0]]))
    facts.mark("gates", atoms(2, 9))
    assert facts.marked("gates").tolist() == [2, 4, 9]
    assert facts.marked("consumed").tolist() == []


# ---------------------------------------------------------------------------------------------- what stays


def test_nothing_is_coupled_through_what_belongs_to_nothing() -> None:
    facts = Facts()
    free, one, other = axis(facts, "free", 2), axis(facts, "one", 3), axis(facts, "other", 3)
    padded = torch.tensor([float(FIXED), float(FIXED), float(FIXED)])
    facts.couple(one, padded)
    facts.couple(other, padded)
    coupled = decide(facts)
    assert partition(coupled) == united(facts.n_atoms, ())
    assert frozen(coupled) == dict.fromkeys(range(3, 9), "it meets a tensor whose size is fixed")
    assert int(free[0]) not in frozen(coupled)


def test_what_is_coupled_with_what_must_stay_stays_and_the_first_reason_is_given() -> None:
    facts = Facts()
    one, other = axis(facts, "one", 3), axis(facts, "other", 3)
    facts.fix(other[:2], "it reaches the output")
    facts.fix(one[1:], "it is mixed")
    facts.couple(one, other)
    assert frozen(decide(facts)) == {
        1: "it reaches the output",
        4: "it reaches the output",
        2: "it reaches the output",
        5: "it reaches the output",
        3: "it is mixed",
        6: "it is mixed",
    }


def test_what_belongs_to_nothing_gets_no_reason_of_its_own() -> None:
    facts = Facts()
    axis(facts, "one", 2)
    facts.fix(torch.tensor([float(FIXED)]), "it is padded")
    assert decide(facts).reasons == {}


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
    facts, generator = Facts(), torch.Generator().manual_seed(seed)
    first = axis(facts, "first", int(np.prod(shape))).reshape(shape)
    second = first.permute(*reversed(range(len(shape))))
    third = axis(facts, "third", 6).reshape(3, 2)
    for grid in (first, second, third):
        facts.grid(grid)
    random_edges(facts, torch.cat([first.flatten(), third.flatten()]), seed, generator)
    coupled = decide(facts)
    for gone in subsets(sorted(set(coupled.component.tolist())), generator):
        for grid in (first, second, third):
            kept = ~np.isin(coupled.component[grid.numpy().astype(np.int64)], list(gone))
            assert is_whole(kept)


@pytest.mark.parametrize(("shape", "units"), [((2, 4), 4), ((4, 2), 4), ((3, 3), 3), ((5, 2, 3), 5)])
def test_a_grid_is_cut_along_the_dimension_that_leaves_the_most_units(
    shape: tuple[int, ...], units: int
) -> None:
    facts = Facts()
    facts.grid(axis(facts, "grid", int(np.prod(shape))).reshape(shape))
    assert len(partition(decide(facts))) == units


def test_a_grid_follows_what_is_coupled_already() -> None:
    facts = Facts()
    grid = axis(facts, "grid", 8).reshape(2, 4)
    facts.grid(grid)
    facts.couple(grid[:, :1], grid)  # whole rows: the two heads
    assert len(partition(decide(facts))) == 2
    facts.couple(grid[:1, :1], grid)
    assert len(partition(decide(facts))) == 1


def test_labels_along_one_dimension_are_no_grid() -> None:
    facts = Facts()
    facts.grid(axis(facts, "vector", 6).reshape(1, 6, 1))
    assert not facts.grids


# ----------------------------------------------------------------------------------------------- covers


def test_a_coarse_label_goes_with_all_that_it_covers() -> None:
    facts = Facts()
    heads, widths = axis(facts, "heads", 3).reshape(3, 1), axis(facts, "widths", 6).reshape(3, 2)
    facts.cover(heads, widths)
    facts.couple(widths[:, :1], widths)
    assert partition(decide(facts)) == {frozenset({1, 4, 5}), frozenset({2, 6, 7}), frozenset({3, 8, 9})}


def test_a_coarse_label_that_several_share_stays_and_they_stay_free() -> None:
    facts = Facts()
    heads, widths = axis(facts, "heads", 3).reshape(3, 1), axis(facts, "widths", 6).reshape(3, 2)
    facts.cover(heads, widths)
    coupled = decide(facts)
    assert partition(coupled) == united(facts.n_atoms, ())
    reason = "it is shared by channels that can go on their own"
    assert frozen(coupled) == dict.fromkeys((1, 2, 3), reason)


def test_what_a_cover_couples_can_complete_another_cover() -> None:
    facts = Facts()
    fine, middle, coarse = axis(facts, "fine", 8), axis(facts, "middle", 4), axis(facts, "coarse", 2)
    facts.cover(coarse.reshape(2, 1), middle.reshape(2, 2))
    facts.cover(middle.reshape(4, 1), fine.reshape(4, 2))
    facts.couple(fine.reshape(2, 4)[:, :1], fine.reshape(2, 4))
    assert sorted(len(one) for one in partition(decide(facts))) == [7, 7]


# ------------------------------------------------------------------------------------------- attributes


def use(labels: Tensor | None, attribute: Attribute = HEADS, *, silent: bool = False) -> SizeUse:
    """The attribute gives the number of rows of `labels`."""
    slices = None if labels is None else labels.numpy().astype(np.int64).reshape(len(labels), -1)
    return SizeUse(attribute, slices, silent)


def test_an_attribute_has_one_value_wherever_it_is_used() -> None:
    facts = Facts()
    queries, values = axis(facts, "queries", 4), axis(facts, "values", 4)
    facts.sizes += [use(queries), use(values)]
    coupled = decide(facts)
    assert partition(coupled) == {frozenset({i, i + 4}) for i in range(1, 5)}
    assert coupled.sizes[HEADS].tolist() == coupled.component[queries.long().numpy()].tolist()


def test_different_attributes_do_not_couple_what_they_size() -> None:
    facts = Facts()
    facts.sizes += [use(axis(facts, "a", 3)), use(axis(facts, "b", 3), Attribute("attention", "other"))]
    coupled = decide(facts)
    assert len(partition(coupled)) == 6
    assert len(coupled.sizes) == 2


def test_an_attribute_that_also_sizes_something_else_keeps_what_it_sizes() -> None:
    facts = Facts()
    facts.sizes += [use(axis(facts, "heads", 3)), use(None)]
    coupled = decide(facts)
    assert set(frozen(coupled).values()) == {"attention.num_heads also sizes something that has to stay"}
    assert len(frozen(coupled)) == 3
    assert coupled.sizes == {}


def test_an_attribute_of_a_dimension_that_is_cut_inside_does_not_shrink() -> None:
    facts = Facts()
    grid = axis(facts, "grid", 8).reshape(2, 4)
    facts.grid(grid)  # goes by columns, so that the attribute of its rows stays
    facts.sizes.append(use(grid))
    coupled = decide(facts)
    assert len(partition(coupled)) == 4
    assert coupled.sizes == {}
    assert coupled.reasons == {}


def test_what_an_attribute_declares_is_sized_and_couples_nothing() -> None:
    facts = Facts()
    one, other = axis(facts, "one", 3), axis(facts, "other", 3)
    width = Attribute("", "num_features")
    facts.sizes += [use(one, width, silent=True)]
    coupled = decide(facts)
    assert coupled.sizes[width].tolist() == coupled.component[one.long().numpy()].tolist()
    facts.sizes += [use(other, width, silent=True)]
    assert len(partition(decide(facts))) == 6


# ------------------------------------------------------------------------------------------------ order


def random_facts(seed: int, order: Callable[[list[int]], list[int]]) -> Facts:
    """Facts of all kinds, written down in an order of the caller's."""
    facts, generator = Facts(), torch.Generator().manual_seed(seed)
    grids = [
        axis(facts, f"grid {i}", 12).reshape(shape) for i, shape in enumerate([(3, 4), (2, 6), (2, 3, 2)])
    ]
    coarse = axis(facts, "coarse", 3).reshape(3, 1)
    flat = torch.cat([grid.flatten() for grid in grids])
    notes: list[Callable[[], object]] = [
        *(lambda grid=grid: facts.grid(grid) for grid in grids),
        lambda: facts.cover(coarse, grids[0]),
        lambda: facts.sizes.append(use(grids[1].T)),
        lambda: facts.sizes.append(use(grids[2].reshape(6, 2))),
        lambda: facts.fix(flat[seed : seed + 1], "it reaches the output"),
    ]
    for _ in range(seed % 5):
        pair = flat[torch.randint(len(flat), (2,), generator=generator)]
        notes.append(lambda pair=pair: facts.couple(pair[:1], pair[1:]))
    for number in order(list(range(len(notes)))):
        notes[number]()
    return facts


@pytest.mark.parametrize("seed", range(15))
def test_the_decision_does_not_depend_on_the_order_of_what_was_seen(seed: int) -> None:
    orders: list[Callable[[list[int]], list[int]]] = [
        lambda numbers: numbers,
        lambda numbers: numbers[::-1],
        lambda numbers: numbers[1::2] + numbers[::2],
    ]
    decided = [decide(random_facts(seed, order)) for order in orders]
    for one, other in itertools.pairwise(decided):
        assert partition(one) == partition(other)
        assert frozen(one).keys() == frozen(other).keys()


@pytest.mark.parametrize("seed", range(15))
def test_a_decision_satisfies_every_requirement_at_once(seed: int) -> None:
    facts = random_facts(seed, lambda numbers: numbers)
    grids = [grid.copy() for grid in facts.grids.values()]
    coupled = decide(facts)
    free = sorted(set(coupled.component[1:].tolist()) - coupled.reasons.keys())
    for gone in subsets(free, torch.Generator().manual_seed(seed)):
        kept = ~np.isin(coupled.component, list(gone))
        assert all(is_whole(kept[grid]) for grid in grids)
        for coarse, fine in facts.covers:
            assert (kept[coarse] == kept[fine].any(1)).all()
        for attribute, numbers in coupled.sizes.items():
            sized = [
                one.slices for one in facts.sizes if one.attribute == attribute and one.slices is not None
            ]
            values = {int(kept[slices].any(1).sum()) for slices in sized}
            assert values == {int((~np.isin(numbers, list(gone))).sum())}
