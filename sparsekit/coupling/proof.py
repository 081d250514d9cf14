"""The proof of groups: a copy that hides nothing is cut on trial, and compared with the masked copy."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsekit.errors import VerificationError, first_line
from sparsekit.evaluation import copied, evaluating
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.places import Place
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.cut import cut_masked_
from sparsekit.surgery.mask import detached
from sparsekit.surgery.unstable_outputs import largest_difference_of_layers
from sparsekit.surgery.verify import agreement, outputs

# In float64 a correct cut agrees to about 1e-12 of the largest output; a wrong index is off by far more.
_PROOF_TOLERANCE = 1e-6
_FLOAT32_TOLERANCE = 1e-4
# Above this the proof is made in float32: a pass in float64 takes many seconds on a small machine.
_MOST_MACS_IN_DOUBLE = 8e9
# What groups of many units lose; groups of few cannot lose the same.
_SHARES = (0.41, 0.29, 0.37, 0.23, 0.46, 0.31)
_SMALL = 8
# Which groups are cut, how (see `Trial.cut`), and how many units stay.
_Which = tuple[list[str], int, int]


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
        if not trial.cut_apart(every):
            break
    else:
        failures = trial.search(trial.cut_apart)
    trial.groups = _with_fewest_rewrites(trial, [g.name for g in groups.free if g.name not in failures])
    groups = trial.groups
    passed = [group.name for group in groups.free if group.name not in failures]
    if passed and trial.cut_and_train(passed):  # some models have branches that only training reaches
        failures |= trial.search(trial.cut_and_train, passed)
    passed = [name for name in passed if name not in failures]
    least = _least(trial, passed, failures)
    proved = [
        replace(g, frozen=failures[g.name]) if g.name in failures else replace(g, least=least.get(g.name, 1))
        for g in groups
    ]
    return replace(groups, groups=tuple(proved))


def _least(trial: Trial, passed: list[str], failures: dict[str, str]) -> dict[str, int]:
    """How many units have to stay in groups that cannot be cut to one: two; those that then fail join `failures`.

    Code that squeezes its tensors, for example, loses a dimension of one channel.
    """
    if not passed or not trial.cut(passed, left=1):
        return {}
    few = trial.search(lambda names: trial.cut(names, left=1), passed)
    failures |= trial.search(lambda names: trial.cut(names, left=2), list(few))
    failures |= {name: few[name] for name in few if trial.groups[name].n_channels < 3}
    return {name: 2 for name in few if name not in failures}


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
        if trial.cut_apart(names):
            trial.groups = before
    return trial.groups


def _without_places(groups: ChannelGroups, modules: set[str]) -> ChannelGroups:
    """The groups without the rewrites in these modules."""
    fewer = [replace(g, rewrites=tuple(p for p in g.rewrites if p.module not in modules)) for g in groups]
    return replace(groups, groups=tuple(fewer))


class Trial:
    """Trial cuts of a copy of the model: a quarter to a half of the channels of some groups at a time."""

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        self.model, self.groups = model, groups
        self._inputs = [way.draw(1, model) for way in groups.inputs.ways]
        self._last: tuple[_Which, nn.Module, list[Tensor]] = (([], 0, 0), model, [])
        self._trains: bool | None = None
        # Whether the outputs jump at noise of rounding size, as a detector's may; not known before a trial fails.
        self._jumps: bool | None = None

    def search(
        self, attempt: Callable[[list[str]], str], names: Sequence[str] | None = None
    ) -> dict[str, str]:
        """Find the groups that fail, and why, by bisection.

        Groups of layers that differ in a number only (the blocks of a stage) are tried together; if their first and
        their last fail, all of them are taken to fail for the same reason.
        """
        failures: dict[str, str] = {}
        alike = _alike(names if names is not None else [group.name for group in self.groups.free])

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

        every = [name for one in alike.values() for name in one]
        if not attempt(every):
            return {}
        classes, middle = list(alike.values()), len(alike) // 2
        for some in (classes[:middle], classes[middle:]) if middle else (classes,):
            bisect(some)
        passed = [name for name in every if name not in failures]
        if passed and attempt(passed):  # some fail only with others
            failures |= _failing_together(attempt, passed)
        return failures

    def cut_apart(self, names: list[str]) -> str:
        """What went wrong in any of several cuts of these groups; any two lose different shares in one of them.

        If they always lost the same, sizes that only happen to agree would pass for right.
        """
        small = [n for n in (self.groups[name].n_channels for name in names) if n < _SMALL]
        n_cuts = 1
        while len(_SHARES) ** n_cuts < len(names) or (small and min(small) ** (n_cuts - 1) < len(small)):
            n_cuts += 1
        return next((reason for which in range(n_cuts) if (reason := self.cut(names, which))), "")

    def cut(self, names: list[str], which: int = 0, *, left: int = 0) -> str:
        """What went wrong; an empty string if the masked and the cut model agree.

        which: of several cuts of the same groups. left: how many units stay of each, if not what `which` says.
        """
        plan = self._plan(names, which, left)
        exact = next(self.model.parameters()).dtype == torch.float64
        tolerance = _PROOF_TOLERANCE if exact else _FLOAT32_TOLERANCE
        try:
            masked, expected = self._masked((names, which, left), plan)
            cut = cut_masked_(copied(masked), plan)
            failure = _disagreement(expected, self._outputs(cut), tolerance)
            if failure and self._jumps is not False:
                found = [
                    largest_difference_of_layers(masked, cut, plan, inputs, tolerance)
                    for inputs in self._inputs
                ]
                self._jumps = None not in found
                if all(one is not None and one <= tolerance for one in found):
                    failure = ""
        except Exception as error:
            return first_line(error)
        return failure

    def cut_and_train(self, names: list[str]) -> str:
        """What went wrong in training mode on two inputs; an empty string if nothing, or if the uncut model fails."""
        plan = self._plan(names)
        masked, _ = self._masked((names, 0, 0), plan)
        failure = self._training_pass(cut_masked_(copied(masked), plan))
        if failure and self._trains is None:
            self._trains = not self._training_pass(copied(self.model))
        return failure if self._trains else ""

    def _training_pass(self, model: nn.Module) -> str:
        model = model.float().train()
        try:
            with torch.no_grad():
                for way in self.groups.inputs.ways:
                    way.draw(0, model, batch=2).call(model)
        except Exception as error:
            return first_line(error)
        return ""

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """For all ways to call the model."""
        return [tensor for inputs in self._inputs for tensor in outputs(model, inputs)]

    def _masked(self, which: _Which, plan: PrunePlan) -> tuple[nn.Module, list[Tensor]]:
        """The masked model and its outputs; kept, because trials with other rewrites ask for them again."""
        if self._last[0] != which:
            masked = detached(self.model, plan)
            self._last = (which, masked, self._outputs(masked))
        return self._last[1:]

    def _plan(self, names: Sequence[str], which: int = 0, left: int = 0) -> PrunePlan:
        generator = torch.Generator().manual_seed(len(names))
        masks = {}
        large = {group.name: i for i, group in enumerate(g for g in self.groups if g.n_channels >= _SMALL)}
        small = {group.name: i for i, group in enumerate(g for g in self.groups if g.n_channels < _SMALL)}
        for name in names:
            n = self.groups[name].n_channels
            if left:
                stay = min(left, n)
            elif name in large:
                stay = n - round(n * _share(large[name], which))
            else:
                stay = _few(n, small[name], which)
            masks[name] = torch.zeros(n, dtype=torch.bool)
            masks[name][torch.randperm(n, generator=generator)[:stay]] = True
        return make_plan(self.groups, masks)


def _share(number: int, which: int) -> float:
    """The share that the group of this number loses in one of the cuts: by the digits of its number.

    In the first all groups lose some, in the others some stay whole.
    """
    digit = number // len(_SHARES) ** which % len(_SHARES)
    return _SHARES[digit] if digit or not which else 0.0


def _few(n: int, number: int, which: int) -> int:
    """How many units a group of few keeps in one of the cuts, in the same way; a whole block goes, or stays."""
    if n == 1:
        return number >> (which - 1) & 1 if which else 0
    return 1 + number // n ** (which - 1) % n if which else 1 + number % (n - 1)


def _disagreement(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> str:
    """How the outputs of two models differ; an empty string if they agree."""
    try:
        found = agreement(ours, theirs)
    except VerificationError as error:
        return str(error)
    if found.max_rel <= tolerance:
        return ""
    return f"the cut model's outputs are off by {found.max_rel:.2g} of the largest"


def _alike(names: Sequence[str]) -> dict[str, list[str]]:
    """Groups by their names without numbers: those of the blocks of a stage belong together."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[re.sub(r"\d+", "#", name)].append(name)
    return alike


def _failing_together(attempt: Callable[[list[str]], str], names: Sequence[str]) -> dict[str, str]:
    """The groups that fail with some before them, though each passes alone: taken in, one after the other."""
    failures: dict[str, str] = {}
    passed: list[str] = []
    for one in _alike(names).values():
        for some in (one,) if not attempt([*passed, *one]) else ([name] for name in one):
            reason = attempt([*passed, *some])
            if reason:
                told = f"a trial cut with other groups failed: {reason}"
                failures |= dict.fromkeys(some, told)
            else:
                passed += some
    return failures


def randomised(model: nn.Module, inputs: InputSpec, *, exact: bool) -> nn.Module:
    """A copy with random norms and scales: zero-initialised ones would make any cut look right.

    `exact`: in float64, where a wrong index cannot pass for rounding, if the model runs in it.
    """
    trial = copied(model)
    if exact:
        try:
            with evaluating(trial.double()):
                inputs.draw(0, trial).call(trial)
        except Exception:
            trial = copied(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in trial.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
                centred = name.endswith(("bias", "running_mean"))
                tensor.copy_(0.2 * (noise - 0.5) if centred else 0.5 + noise)
    return trial
