"""The proof of groups: a copy that hides nothing is cut on trial, and compared with the masked copy."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsekit.errors import VerificationError, first_line
from sparsekit.evaluation import evaluating
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.places import Place
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.cut import cut_masked_
from sparsekit.surgery.mask import detached
from sparsekit.surgery.verify import agreement, outputs

# In float64 a correct cut agrees to about 1e-12 of the largest output; a wrong index is off by far more.
_PROOF_TOLERANCE = 1e-6
_FLOAT32_TOLERANCE = 1e-4
# Above this the proof is made in float32: a pass in float64 takes many seconds on a small machine.
_MOST_MACS_IN_DOUBLE = 8e9


def prove(model: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    """Freeze every free group whose cut model does not agree with the masked one, or does not train."""
    if not groups.free:
        return groups
    groups = _with_rewrites_of_what_they_run_through(groups)
    model = randomised(model, groups.inputs, exact=fits_in_double(groups))
    trial = Trial(model, replace(groups, groups=()))
    failures: dict[str, str] = {}
    every = [group.name for group in groups.free]
    for variant in (_rewritten(groups, ()), _rewritten(groups, (-1,)), groups):
        if variant == trial.groups:
            continue
        trial.groups = variant
        if not trial.cut(every):
            break
    else:
        failures = trial.search(trial.cut)
    trial.groups = _with_fewest_rewrites(trial, [g.name for g in groups.free if g.name not in failures])
    groups = trial.groups
    passed = [group.name for group in groups.free if group.name not in failures]
    if passed and trial.cut_and_train(passed):  # some models have branches that only training reaches
        failures |= trial.search(trial.cut_and_train, passed)
    proved = [replace(g, frozen=failures[g.name]) if g.name in failures else g for g in groups]
    return replace(groups, groups=tuple(proved))


def fits_in_double(groups: ChannelGroups) -> bool:
    """Whether the model is small enough for trials in float64."""
    return sum(layer.macs for layer in groups.layers) <= _MOST_MACS_IN_DOUBLE


def _with_rewrites_of_what_they_run_through(groups: ChannelGroups) -> ChannelGroups:
    """Give each group the rewrites of modules that hold a member of it, too: code computes sizes from widths."""
    places = sorted({place for group in groups for place in group.rewrites})

    def own(group: ChannelGroup) -> tuple[Place, ...]:
        held = [m.tensor for m in group.members]
        prefixes = {p: f"{p.module}." if p.module else "" for p in places if p.size == -1}
        through = {p for p, prefix in prefixes.items() if any(name.startswith(prefix) for name in held)}
        return tuple(sorted({*group.rewrites, *through}))

    return replace(groups, groups=tuple(replace(group, rewrites=own(group)) for group in groups))


def _rewritten(groups: ChannelGroups, sizes: tuple[int, ...]) -> ChannelGroups:
    """The groups with only those rewrites that put one of `sizes` into the code; -1 leaves a size to torch."""
    some = [replace(g, rewrites=tuple(p for p in g.rewrites if p.size in sizes)) for g in groups]
    return replace(groups, groups=tuple(some))


def _with_fewest_rewrites(trial: Trial, names: list[str]) -> ChannelGroups:
    """The groups without rewrites that the cut does not need; modules of one class lose theirs together."""
    modules = dict(trial.model.named_modules())
    kinds = {type(modules[place.module]): None for g in trial.groups for place in g.rewrites}
    for kind in kinds:
        before = trial.groups
        trial.groups = _without_places(before, {n for n, module in modules.items() if type(module) is kind})
        if trial.cut(names):
            trial.groups = before
    return trial.groups


def _without_places(groups: ChannelGroups, modules: set[str]) -> ChannelGroups:
    """The groups without the rewrites in these modules."""
    fewer = [replace(g, rewrites=tuple(p for p in g.rewrites if p.module not in modules)) for g in groups]
    return replace(groups, groups=tuple(fewer))


class Trial:
    """Trial cuts of a copy of the model: a half, a third or a quarter of the channels of some groups at a time."""

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        self.model, self.groups = model, groups
        self._inputs = groups.inputs.draw(1, model)
        self._last: tuple[list[str], nn.Module, list[Tensor]] = ([], model, [])
        self._trains: bool | None = None

    def search(
        self, attempt: Callable[[list[str]], str], names: Sequence[str] | None = None
    ) -> dict[str, str]:
        """Find the groups that fail, and why, by bisection.

        Groups of layers that differ in a number only (the blocks of a stage) are tried together; if their first and
        their last fail, all of them are taken to fail for the same reason.
        """
        failures: dict[str, str] = {}
        alike: dict[str, list[str]] = defaultdict(list)
        for name in names if names is not None else [group.name for group in self.groups.free]:
            alike[re.sub(r"\d+", "#", name)].append(name)

        def bisect(classes: list[list[str]]) -> None:
            names = [name for one in classes for name in one]
            reason = attempt(names)
            if not reason:
                return
            if len(names) == 1:
                failures[names[0]] = f"a trial cut failed: {reason}"
            elif len(classes) > 1:
                bisect(classes[: len(classes) // 2])
                bisect(classes[len(classes) // 2 :])
            elif (first := attempt(names[:1])) and attempt(names[-1:]):
                failures.update(dict.fromkeys(names, f"a trial cut failed: {first}"))
            else:
                middle = len(names) // 2
                bisect([names[:middle]])
                bisect([names[middle:]])

        bisect(list(alike.values()))
        passed = [name for one in alike.values() for name in one if name not in failures]
        if failures and passed and (reason := attempt(passed)):
            failures |= dict.fromkeys(passed, f"a trial cut of several groups together failed: {reason}")
        return failures

    def cut(self, names: list[str]) -> str:
        """What went wrong; an empty string if the masked and the cut model agree."""
        plan = self._plan(names)
        try:
            masked, expected = self._masked(names, plan)
            found = agreement(expected, outputs(cut_masked_(copy.deepcopy(masked), plan), self._inputs))
        except VerificationError as error:
            return str(error)
        except Exception as error:
            return first_line(error)
        exact = next(self.model.parameters()).dtype == torch.float64
        if not found.max_rel <= (_PROOF_TOLERANCE if exact else _FLOAT32_TOLERANCE):
            return f"the cut model's outputs are off by {found.max_rel:.2g} of the largest"
        return ""

    def cut_and_train(self, names: list[str]) -> str:
        """What went wrong in training mode on two inputs; an empty string if nothing, or if the uncut model fails."""
        plan = self._plan(names)
        masked, _ = self._masked(names, plan)
        failure = self._training_pass(cut_masked_(copy.deepcopy(masked), plan))
        if failure and self._trains is None:
            self._trains = not self._training_pass(copy.deepcopy(self.model))
        return failure if self._trains else ""

    def _training_pass(self, model: nn.Module) -> str:
        model = model.float().train()
        try:
            with torch.no_grad():
                self.groups.inputs.draw(0, model, batch=2).call(model)
        except Exception as error:
            return first_line(error)
        return ""

    def _masked(self, names: list[str], plan: PrunePlan) -> tuple[nn.Module, list[Tensor]]:
        """The masked model and its outputs; kept, because trials with other rewrites ask for them again."""
        if self._last[0] != names:
            masked = detached(self.model, plan)
            self._last = (names, masked, outputs(masked, self._inputs))
        return self._last[1:]

    def _plan(self, names: Sequence[str]) -> PrunePlan:
        generator = torch.Generator().manual_seed(len(names))
        masks = {}
        # Groups lose different shares: sizes that only happen to agree would pass for right.
        numbers = {group.name: number for number, group in enumerate(self.groups)}
        for name in names:
            n, number = self.groups[name].n_channels, numbers[name]
            masks[name] = torch.ones(n, dtype=torch.bool)
            masks[name][torch.randperm(n, generator=generator)[: max(1, n // (2 + number % 3))]] = False
        return make_plan(self.groups, masks)


def randomised(model: nn.Module, inputs: InputSpec, *, exact: bool) -> nn.Module:
    """A copy with random norms and scales: zero-initialised ones would make any cut look right.

    `exact`: in float64, where a wrong index cannot pass for rounding, if the model runs in it.
    """
    trial = copy.deepcopy(model)
    if exact:
        try:
            with evaluating(trial.double()):
                inputs.draw(0, trial).call(trial)
        except Exception:
            trial = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in trial.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
                centred = name.endswith(("bias", "running_mean"))
                tensor.copy_(0.2 * (noise - 0.5) if centred else 0.5 + noise)
    return trial
