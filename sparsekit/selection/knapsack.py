"""Which channels to keep under limits on latency, MACs, params or channels: as much importance as fits.

It is a knapsack whose items depend on each other: the cost of a channel depends on how many others its layers keep.
Channels of a group go in the order of their importance, in whole steps, so a solution is how many each group keeps. It
maximises

    sum over groups of W log(kept importance / W),    W the importance of the whole group

A plain sum would empty some layers and spare others. With the logarithm a channel counts relative to what is left of
its group; the first channels to go count as in the sum.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekit.errors import InputError
from sparsekit.options import Quantity
from sparsekit.selection.costs import Array, CostModel, CostTerm
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.masks import Masks, Scores

__all__ = ["choose_channels"]

# A smaller gain, relative to the whole, is a rounding error.
_NOTHING = 1e-9
# The most counts of kept channels that are considered for a group.
_MAX_OPTIONS = 64
_MAX_SWEEPS = 20


def choose_channels(groups: ChannelGroups, importance: Scores, limits: Mapping[Quantity, float]) -> Masks:
    """Return keep-masks that keep the most importance under all `limits`.

    `importance` >= 0 is (n_channels,) for each free group, comparable across groups (`sparsekit.importance`,
    `Sparsifier.importance`), and infinite for groups that stay whole. `limits` are shares in (0, 1] of the dense
    model's "macs", "params", "channels" or "latency" (which needs groups from `measure_layers`). Groups keep a number
    of channels that their `rounding` allows. Channels that cost nothing may stay, even without importance.

    A greedy search goes down from the dense model: next goes what has the least importance for its cost, one step or
    several. Then pairs of groups trade channels until no pair gains. Costs are those at the present widths of the other
    groups. Raises InputError for limits out of reach or not in (0, 1], or importance that does not fit the groups.
    """
    return Knapsack(groups, importance).under(limits)


class Knapsack:
    """Finds keep-masks for one model, under any limits.

    `known` has for each free group the importance of its channels, as `choose_channels` takes it, or its measured loss
    curve: then the sum of the losses is kept least. Raises InputError for importance that does not fit the groups.
    """

    def __init__(self, groups: ChannelGroups, known: Mapping[str, torch.Tensor | LossCurve]) -> None:
        self._groups = groups
        self._costs = CostModel(groups)
        self._order: dict[str, torch.Tensor] = {}
        self._options: dict[str, NDArray[np.int64]] = {}
        self._objective: dict[str, Array] = {}  # of each option
        for group in groups.free:
            one, name = known.get(group.name), group.name
            if isinstance(one, LossCurve):
                self._order[name], self._options[name] = one.order, counts_of(group)
                # The smallest objective is 0, as with importance.
                self._objective[name] = one.losses[0] - one.losses[self._options[name]]
            else:
                self._order[name], self._options[name], self._objective[name] = _ranked(group, one)
        self._dense = {name: len(options) - 1 for name, options in self._options.items()}
        self._all = sum(float(objective[-1]) for objective in self._objective.values())

    def under(self, limits: Mapping[Quantity, float]) -> Masks:
        """Return keep-masks under limits (shares of the dense model). Raises InputError for limits out of reach."""
        for quantity, share in limits.items():
            if quantity not in get_args(Quantity) or not 0 < share <= 1:
                raise InputError(
                    f"limits must be shares in (0, 1] of {', '.join(get_args(Quantity))}, got {quantity}: {share}"
                )
        chosen = self._traded(self._greedy(limits), limits)
        masks = {}
        for name, option in chosen.items():
            mask = torch.zeros(len(self._order[name]), dtype=torch.bool)
            mask[self._order[name][: int(self._options[name][option])]] = True
            masks[name] = mask
        return masks

    def least(self, quantity: Quantity) -> float:
        """Return the smallest share of a quantity that is within reach."""
        return self._cost(quantity, dict.fromkeys(self._dense, 0)) / self._cost(quantity, self._dense)

    def _cost(self, quantity: Quantity, chosen: Mapping[str, int]) -> float:
        counts = {name: float(self._options[name][option]) for name, option in chosen.items()}
        return self._costs.of(quantity, counts)

    def _greedy(self, limits: Mapping[Quantity, float]) -> dict[str, int]:
        """Go down from the dense model until all limits are met, the lowest first."""
        chosen = dict(self._dense)
        allowed = {q: share * self._cost(q, self._dense) for q, share in limits.items()}
        for quantity in sorted(allowed, key=lambda q: limits[q]):
            self._descend(chosen, quantity, allowed[quantity])
        return chosen

    def _descend(self, chosen: dict[str, int], quantity: Quantity, allowed: float) -> None:
        terms = self._costs.terms(quantity)
        touching = _by_group(terms)
        cost = self._cost(quantity, chosen)
        version = dict.fromkeys(chosen, 0)
        heap: list[tuple[float, str, int, int, float]] = []

        def offer(name: str) -> None:
            found = self._best_drop(name, chosen, touching.get(name, ()))
            if found is not None:
                ratio, option, saved = found
                heapq.heappush(heap, (ratio, name, version[name], option, saved))

        for name in chosen:
            offer(name)
        while cost > allowed * (1 + _NOTHING):
            if not heap:
                raise InputError(self._out_of_reach(quantity, allowed))
            _, name, when, option, saved = heapq.heappop(heap)
            if when != version[name]:
                continue
            chosen[name] = option
            cost -= saved
            for other in {name, *(n for term in touching.get(name, ()) for n in term.names)}:
                version[other] += 1
                offer(other)

    def _best_drop(
        self, name: str, chosen: Mapping[str, int], terms: Sequence[CostTerm]
    ) -> tuple[float, int, float] | None:
        """Find the drop that loses the least importance for its cost: (ratio, option to drop to, saving)."""
        option = chosen[name]
        if option == 0 or not terms:
            return None
        costs = self._costs_of_options(name, chosen, terms)
        saved = costs[option] - costs[:option]
        lost = self._objective[name][option] - self._objective[name][:option]
        helps = saved > _NOTHING * abs(costs[option])
        if not helps.any():
            return None
        ratio = np.where(helps, lost / np.where(helps, saved, 1.0), np.inf)
        best = int(ratio.argmin())
        return float(ratio[best]), best, float(saved[best])

    def _costs_of_options(self, name: str, chosen: Mapping[str, int], terms: Sequence[CostTerm]) -> Array:
        counts: dict[str, Array | float] = {n: float(self._options[n][o]) for n, o in chosen.items()}
        counts[name] = self._options[name].astype(float)
        return np.broadcast_to(sum(term.at(counts) for term in terms), (len(self._options[name]),))

    def _traded(self, chosen: dict[str, int], limits: Mapping[Quantity, float]) -> dict[str, int]:
        """Improve by trades between two groups (or within the only one) until no trade gains."""
        allowed = {q: share * self._cost(q, self._dense) for q, share in limits.items()}
        costs = {q: self._cost(q, chosen) for q in allowed}
        touching = {q: _by_group(self._costs.terms(q)) for q in allowed}
        names = [name for name in chosen if len(self._options[name]) > 1]
        pairs = list(combinations(names, 2)) or [(name, name) for name in names]
        changed = set(names)
        for _ in range(_MAX_SWEEPS):
            stale, changed = changed, set()
            for pair in pairs:
                if stale.isdisjoint(pair) and changed.isdisjoint(pair):
                    continue
                better = self._best_pair(pair, chosen, costs, allowed, touching)
                if better is not None:
                    chosen.update(better)
                    costs = {q: self._cost(q, chosen) for q in allowed}
                    changed.update(n for name in pair for n in self._neighbours(name, touching))
            if not changed:
                break
        return chosen

    def _neighbours(
        self, name: str, touching: Mapping[Quantity, Mapping[str, Sequence[CostTerm]]]
    ) -> Iterator[str]:
        yield name
        for by_group in touching.values():
            for term in by_group.get(name, ()):
                yield from term.names

    def _best_pair(
        self,
        pair: tuple[str, str],
        chosen: Mapping[str, int],
        costs: Mapping[Quantity, float],
        allowed: Mapping[Quantity, float],
        touching: Mapping[Quantity, Mapping[str, Sequence[CostTerm]]],
    ) -> dict[str, int] | None:
        first, second = pair
        rows, columns = self._options[first].astype(float), self._options[second].astype(float)
        kept = self._objective[first][:, None] + self._objective[second][None]
        here = chosen[first], chosen[second]
        if first == second:
            kept, here = self._objective[first][:, None], (chosen[first], 0)
            columns = np.zeros(1)
        gain = kept - kept[here]
        possible = gain > _NOTHING * max(self._all, _NOTHING)
        counts: dict[str, Array | float] = {n: float(self._options[n][o]) for n, o in chosen.items()}
        for quantity, by_group in touching.items():
            if not possible.any():
                return None
            terms = list({id(t): t for t in (*by_group.get(first, ()), *by_group.get(second, ()))}.values())
            before = float(sum(term.at(counts) for term in terms))
            trial = counts | {second: columns[None]} | {first: rows[:, None]}
            after = np.broadcast_to(sum((term.at(trial) for term in terms), start=0.0), kept.shape)
            possible &= costs[quantity] - before + after <= allowed[quantity] * (1 + _NOTHING)
        if not possible.any():
            return None
        best = np.unravel_index(np.where(possible, gain, -np.inf).argmax(), kept.shape)
        return {second: int(best[1])} | {first: int(best[0])}  # for a group with itself the first counts

    def _out_of_reach(self, quantity: Quantity, allowed: float) -> str:
        dense = self._cost(quantity, self._dense)
        frozen = sum(1 for group in self._groups if group.frozen)
        return (
            f"{quantity} {allowed / dense:.3f} is out of reach: keeping the fewest channels allowed leaves "
            f"{self.least(quantity):.3f}"
            + (f"; {frozen} of {len(self._groups)} groups are frozen" if frozen else "")
            + "; ask for less, or lower min_channels or round_to"
        )


def _ranked(
    group: ChannelGroup, importance: torch.Tensor | None
) -> tuple[torch.Tensor, NDArray[np.int64], Array]:
    """Return the order of a group's channels by importance, its options, and the objective of each."""
    values = _checked(group, importance).double().cpu()
    order = values.argsort(descending=True, stable=True)
    sums = np.concatenate([[0.0], values[order].cumsum(0).numpy()])
    options = counts_of(group)
    if not bool(values.isfinite().all()):
        options, sums = options[-1:], np.zeros_like(sums)
    return order, options, _objective(sums[options])


def _checked(group: ChannelGroup, values: torch.Tensor | None) -> torch.Tensor:
    if values is None or values.shape != (group.n_channels,) or bool((values.isnan() | (values < 0)).any()):
        got = (
            "none"
            if values is None
            else f"shape {tuple(values.shape)}, values {values.flatten()[:3].tolist()} ..."
        )
        raise InputError(
            f"importance must be {group.n_channels} numbers >= 0 for the group {group.name}, got {got}"
        )
    return values.detach()


def _objective(kept: Array) -> Array:
    """Return W (1 + log(kept / W)) of each option, W being the last; for a residual block (option 0) what is kept."""
    whole = kept[-1]
    if whole <= 0 or kept[0] == 0:
        return kept
    objective: Array = whole * (1 + np.log(kept / whole))
    return objective


def counts_of(group: ChannelGroup) -> NDArray[np.int64]:
    """List how many channels a group may keep, ascending: multiples from the least on, and all."""
    n, multiple, least = group.n_channels, group.rounding.multiple, group.rounding.least
    multiple = max(multiple, -(-n // _MAX_OPTIONS // multiple) * multiple)
    first = -(-least // multiple) * multiple
    return np.unique([*range(first, n, multiple), n])


def _by_group(terms: Sequence[CostTerm]) -> dict[str, list[CostTerm]]:
    """Return by group the terms that depend on it."""
    touching: dict[str, list[CostTerm]] = {}
    for term in terms:
        for name in term.names:
            touching.setdefault(name, []).append(term)
    return touching
