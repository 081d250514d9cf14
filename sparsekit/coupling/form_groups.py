"""Components become channel groups: which tensors produce, normalise and read each channel, by name and position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sparsekit.coupling.labels import FIXED
from sparsekit.coupling.observations import MADE, Atoms, Axis, Observations, Trait
from sparsekit.coupling.solve import Coupled
from sparsekit.structure.groups import ChannelGroup, Member, Role
from sparsekit.structure.places import Attribute, Place

# What can be one member: the gates of an axis, or its other atoms; (number of the axis, whether gates).
Part = tuple[int, bool]
# The atoms of one component by part, ascending.
Runs = dict[Part, Atoms]
# For each component the attributes that size it, with its positions.
Sized = Mapping[int, Mapping[Attribute, list[int]]]
Flags = NDArray[np.bool_]


def form_groups(seen: Observations, coupled: Coupled, parameters: set[str]) -> tuple[ChannelGroup, ...]:
    """Form a group of all components that run through the same tensors in the same way, in the order of the layers.

    Components that no layer produces are left out. `parameters`: the names of trained tensors.
    """
    noted, sized = _Noted(seen), _sized_by_component(coupled.sizes)
    alike: dict[tuple[object, ...], list[tuple[int, Runs]]] = defaultdict(list)
    for number, runs in _by_component(seen, coupled, noted.gate):
        if any(noted.makes[atoms[0]] for atoms in runs.values()):
            sizes = tuple(
                (attribute, len(own)) for attribute, own in sorted(sized.get(number, {}).items(), key=str)
            )
            signature = (*((part, len(atoms)) for part, atoms in sorted(runs.items())), *sizes)
            alike[signature, coupled.reasons.get(number, "")].append((number, runs))
    component_places: dict[int, list[Place]] = defaultdict(list)
    for place, atoms in seen.places:
        for number in np.unique(coupled.component[atoms[atoms != FIXED]]).tolist():
            component_places[number].append(place)
    for number, attributes in sized.items():
        component_places[number] += [place for place, by in seen.quotients.items() if by in attributes]
    formed = [
        _form(seen, sized, noted, components, str(reason), parameters, component_places)
        for (_, reason), components in alike.items()
    ]
    order = {axis.tensor: rank for rank, axis in enumerate(seen.axes)}
    formed.sort(key=lambda group: (order[_root(group).tensor], _root(group).positions[0]))
    return _with_names(formed)


# Of several roles that were noted of an atom, the first of these is its own.
_ROLES: tuple[Role, ...] = ("depthwise", "producer", "consumer", "response", "layer_norm", "norm")


class _Noted:
    """What was noted, as boolean arrays over atoms."""

    def __init__(self, seen: Observations) -> None:
        self.roles = {role: _flags(seen, role) for role in _ROLES}
        self.makes = self.roles["producer"] | self.roles["depthwise"]
        self.factor, self.gate = _flags(seen, "factor"), _flags(seen, "gate")
        # These norms add up channels, too.
        self.summed = _flags(seen, "summed") | self.roles["response"] | self.roles["layer_norm"]

    def role(self, atom: int) -> Role:
        return next((role for role, flags in self.roles.items() if flags[atom]), "parameter")


def _flags(seen: Observations, what: Role | Trait) -> Flags:
    flags = np.zeros(seen.n_atoms, np.bool_)
    flags[seen.noted(what)] = True
    return flags


def _by_component(seen: Observations, coupled: Coupled, gates: Flags) -> Iterator[tuple[int, Runs]]:
    """Each component, with its atoms by part."""
    starts = np.array([axis.first for axis in seen.axes])
    atoms = np.arange(1, seen.n_atoms)
    axis = np.searchsorted(starts, atoms, side="right") - 1
    component, gated = coupled.component[atoms], gates[atoms]
    order = np.lexsort((atoms, gated, axis, component))
    keys = np.stack([component, axis, gated], 1)[order]
    breaks = np.flatnonzero((keys[1:] != keys[:-1]).any(1)) + 1
    number = -1
    runs: Runs = {}
    for run in np.split(order, breaks) if len(order) else ():
        first = run[0]
        if component[first] != number:
            if runs:
                yield number, runs
            number, runs = int(component[first]), {}
        runs[int(axis[first]), bool(gated[first])] = atoms[run]
    if runs:
        yield number, runs


def _form(
    seen: Observations,
    sized: Sized,
    noted: _Noted,
    components: list[tuple[int, Runs]],
    reason: str,
    parameters: set[str],
    places: Mapping[int, list[Place]],
) -> ChannelGroup:
    parts = list(components[0][1])
    # Channels are numbered by their position in the layer that produces them.
    root = next(part for part in parts if noted.makes[components[0][1][part][0]])
    components.sort(key=lambda one: int(one[1][root][0]))
    members = [
        _member(seen, noted, part, [runs[part] for _, runs in components], parameters)
        for part in parts
        if seen.axes[part[0]].tensor != MADE
    ]
    numbers = [number for number, _ in components]
    members += _size_members(sized, numbers)
    rank = {axis.tensor: i for i, axis in enumerate(seen.axes)}
    members.sort(key=lambda m: (m.role == "size", rank.get(m.tensor, 0), m.dim))
    rewrites = sorted({place for number in numbers for place in places.get(number, ())})
    summed = any(noted.summed[atoms].any() for _, runs in components for atoms in runs.values())
    return ChannelGroup("", len(components), tuple(members), reason, tuple(rewrites), summed=summed)


def _member(
    seen: Observations, noted: _Noted, part: Part, atoms: list[Atoms], parameters: set[str]
) -> Member:
    axis: Axis = seen.axes[part[0]]
    role = noted.role(int(atoms[0][0]))
    module = axis.tensor.rpartition(".")[0]
    readers = seen.norms.get(f"{module}.weight" if module else "weight", set())
    norm = None
    if role in ("producer", "depthwise") and len(readers) == 1 and "" not in readers:
        norm = next(iter(readers)).rpartition(".")[0]
    is_factor = role == "parameter" and bool(noted.factor[atoms[0][0]])
    penalised = role not in ("consumer", "response") and norm is None and not part[1] and not is_factor
    return Member(
        axis.tensor,
        axis.dim,
        tuple(int(atom) - axis.first for run in atoms for atom in run),
        len(atoms[0]),
        role,
        penalised=penalised and axis.tensor in parameters,
        norm=norm,
    )


def _sized_by_component(sizes: Mapping[Attribute, Atoms]) -> Sized:
    """For each component the attributes that size it, with its positions."""
    sized: dict[int, dict[Attribute, list[int]]] = defaultdict(lambda: defaultdict(list))
    for attribute, components in sizes.items():
        for position, number in enumerate(components.tolist()):
            sized[number][attribute].append(position)
    return sized


def _size_members(sized: Sized, numbers: list[int]) -> list[Member]:
    members = []
    for attribute, first in sized.get(numbers[0], {}).items():
        owned = [sized.get(number, {}).get(attribute, []) for number in numbers]
        if all(len(positions) == len(first) for positions in owned):
            path = str(Attribute(attribute.module, attribute.name))
            positions = tuple(position for own in owned for position in own)
            members.append(Member(path, attribute.item or 0, positions, len(first), "size"))
    return members


def _root(group: ChannelGroup) -> Member:
    """The first member that produces the group's channels."""
    return next(m for m in group.members if m.role in ("producer", "depthwise"))


def _with_names(groups: list[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """The groups named after their first layer; further groups of the same layer get a number."""
    count: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        name = (_root(group).module or _root(group).tensor).partition(".parametrizations")[0]
        count[name] += 1
        suffix = f"#{count[name]}" if count[name] > 1 else ""
        named.append(replace(group, name=name + suffix))
    return tuple(named)
