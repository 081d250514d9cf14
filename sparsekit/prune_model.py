"""`sk.prune`: the one call for a finished model and a few hundred images, as a story.

    groups -> latencies -> statistics -> curves -> choice -> cut and repair -> learning from the dense model

Each step is judged on images kept apart, and taken only if it brings the outputs nearer to the dense model's.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from rich.console import Console
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError, ModelError, TrainingError, first_line
from sparsekit.evaluation import evaluating, flat_tensors
from sparsekit.latency.layers import measure_layers
from sparsekit.latency.search import SpeedSearch, search_speed
from sparsekit.options import Quantity, RoundTo
from sparsekit.repair.closed_form import repair_weights
from sparsekit.repair.curves import Trials, curves_around, curves_near, loss_curves, order_by_gates
from sparsekit.repair.display import StepDisplay
from sparsekit.repair.distillation import distill
from sparsekit.repair.divergence import Divergence
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.images import collect_images
from sparsekit.repair.refit import refit
from sparsekit.repair.statistics import InputStatistics, input_statistics
from sparsekit.selection.costs import CostModel
from sparsekit.selection.importance import all_alike
from sparsekit.selection.knapsack import Knapsack
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.norms import make_readers_plain_
from sparsekit.surgery.verify import Agreement, verify_cut

__all__ = ["PruneResult", "PruneStep", "prune"]

# By group, the importance of its channels or its measured loss curve.
_Known = Mapping[str, Tensor | LossCurve]
# Of the images, this share is kept apart, and at most so many.
_KEPT_APART = 0.2
_MOST_KEPT_APART = 128
# What a pass with gradients may take, and how much of the layers' outputs it holds at once: about half, as measured.
_STATISTICS_BYTES, _HELD_AT_ONCE = 320 * 2**20, 0.5
_LARGEST_BATCH = 32
# If a choice loses more nats than these, curves are measured again near it, and half way to it as well.
_LITTLE_LOST, _MUCH_LOST = 0.05, 0.5
# Outputs on images that were used may be nearer to the dense model's by this much before more images are asked for.
_OPTIMISM, _OPTIMISM_KL = 2.0, 0.02


@dataclass(frozen=True)
class PruneStep:
    """One step: its name, what it took, and how far the outputs are from the dense model's after it.

    `taken` is False if the step before was nearer, and its model was kept.
    """

    name: str
    seconds: float
    kl: float
    agreement: float
    taken: bool = True


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns.

    - `model` is the pruned model, `plan` what was cut, made of the keep-masks `masks` of `groups`; `proof` says how
      exactly the cut model computed what the masked one does.
    - `speed` is the search that measured the speed-up; None if no speed was asked for.
    - `kl` and `agreement` compare the outputs with the dense model's on images kept apart; those images decided between
      steps too, so measure the accuracy on others. See `Divergence`.
    - `steps` says what each step brought, `seconds` how long all of it took, and `kept` which fractions of "macs",
      "params" and "channels" are left.
    - `remarks` is what the caller should know: few images, layers that could not be repaired, a speed that was missed.
    - `interrupted` says whether Ctrl-C ended the learning.
    """

    model: nn.Module
    plan: PrunePlan
    groups: ChannelGroups
    masks: Masks
    proof: Agreement
    speed: SpeedSearch | None
    kl: float
    agreement: float
    steps: tuple[PruneStep, ...]
    kept: Mapping[Quantity, float]
    seconds: float
    remarks: tuple[str, ...] = ()
    interrupted: bool = False


def prune(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    keep: Mapping[Quantity, float] | None = None,
    ignore: Sequence[str] = (),
    threads: int = 1,
    batch_size: int = 1,
    distill_seconds: float = 120.0,
    distill_steps: int | None = None,
    blocks: bool = True,
    through_layer_norm: bool = False,
    round_to: RoundTo = "auto",
    min_channels: int = 8,
    max_images: int = 512,
    seed: int = 0,
    console: Console | None = None,
) -> PruneResult:
    """Make a finished model faster with a few hundred images of the kind it will see; no labels are needed.

    `images` are normalised as the model expects them: a tensor, an iterable of batches, or a DataLoader, whose labels
    are ignored; the first `max_images` are read, so shuffle them. At least one target is needed, and all that are given
    hold: `speedup` or `latency_ms` in ONNX Runtime on this machine with `threads`, at `batch_size`; `keep`, fractions
    of "macs", "params" or "channels" to keep at most. `ignore` names modules to leave whole, `blocks` lets whole
    residual blocks go too, and `round_to`, `min_channels` and `through_layer_norm` are those of `find_groups`.

    The steps: every group of channels is cut on trial at several widths, repaired by least squares, and the rest of the
    network run to see what that costs. The knapsack takes what costs least for its time. The model is cut and proved,
    repaired in closed form and layer by layer, and learns from the dense model for `distill_seconds`, or for
    `distill_steps` where these are given. After each step the outputs are compared with the dense model's on images
    kept apart, a fifth of all and at most 128; a step that does not bring them nearer is left out. Nothing is fitted to
    these images, but they choose: channels by their loss curves, and steps. Ctrl-C while it learns returns what was
    best so far.

    The caller's model is not changed. The result has its device, dtype and training flags. With a target that is no
    time, and `distill_steps`, the result depends on `seed` alone. Progress is shown on `console`; by default on stderr
    if that is a terminal.

    Raises InputError for arguments and targets that are wrong or out of reach, DataError for images, ModelError for a
    model that cannot be analysed or does not run on the images, VerificationError if the cut cannot be proved.
    """
    called = time.monotonic()
    speed = _Speed(speedup, latency_ms)
    limits = _checked_targets(speed, keep, distill_seconds, distill_steps)
    for name, value in (("threads", threads), ("batch_size", batch_size), ("max_images", max_images)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} must be a whole number >= 1, got {value!r}")
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = collect_images(images, most=max_images)
    first = found[:1].clone()
    example = _like(first, model)
    timed = first.float().expand(batch_size, *found.shape[1:])
    with StepDisplay(console) as show:
        show.begin("finding groups")
        groups = find_groups(
            model,
            example,
            ignore=ignore,
            through_layer_norm=through_layer_norm,
            blocks="all" if blocks else False,
            round_to=round_to,
            min_channels=min_channels,
        )
        _check_free(model, groups)
        if speed.asked:
            show.begin("measuring layers")
            on_cpu = _on_cpu(model)
            groups = measure_layers(on_cpu, groups, timed, threads=threads, progress=show.share)
        _check_reach(groups, speed, limits)
        dense, layout = _working_copy(model, groups, example)
        used, apart = (_like(part, dense).contiguous(memory_format=layout) for part in _split(found, seed))
        n_found = len(found)
        del found, images

        show.begin("statistics of the layers' inputs")
        at_once = _batch_size(dense, used)
        statistics = input_statistics(dense, groups, show.over(torch.split(used, at_once)), seed=seed)
        show.begin("measuring loss curves")
        held_out = HeldOut(dense, groups, (apart,))
        curves = loss_curves(dense, groups, statistics, held_out, progress=show.share)
        judge = _Judge(dense, groups, statistics, held_out)
        started = time.monotonic()
        importance = _importance(judge, curves, limits | speed.limit(groups), show)
        held_out.forget()

        show.begin("choosing channels")
        masks, search = _masks(importance, model, groups, timed, speed, limits, threads)
        plan = make_plan(groups, masks)
        if not (plan.cuts or plan.blocks):
            raise InputError(
                "nothing was cut: no group can lose a whole step of channels under this target; ask for more, or lower "
                "round_to or min_channels"
            )
        pruned = apply_plan(dense, plan)
        proof = verify_cut(dense, pruned, plan)
        best = _Best(pruned, held_out.of(pruned), started, show)

        work = _Work(dense, plan, statistics, held_out, used, at_once, seed, show)
        proof = _repair(best, work) or proof
        remarks = _few_images(best, HeldOut(dense, groups, (used[: len(apart)],), recorded=0), n_found)
        _refit(best, work)
        interrupted = False
        if distill_seconds > 0 and distill_steps != 0:
            remark, interrupted = _learn(best, work, distill_seconds, distill_steps)
            remarks += [remark] if remark else []
    return PruneResult(
        model=_as_given(best.model, model),
        plan=plan,
        groups=groups,
        masks=masks,
        proof=proof,
        speed=search,
        kl=best.divergence.kl,
        agreement=best.divergence.agreement,
        steps=tuple(best.steps),
        kept=_kept(groups, masks),
        seconds=time.monotonic() - called,
        remarks=(
            *remarks,
            *_left_out(statistics, plan),
            *([search.remark] if search and search.remark else []),
        ),
        interrupted=interrupted,
    )


# ------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class _Speed:
    """The speed asked for: a speed-up, a latency, or none."""

    speedup: float | None
    latency_ms: float | None

    @property
    def asked(self) -> bool:
        return self.speedup is not None or self.latency_ms is not None

    def over(self, groups: ChannelGroups) -> float:
        """Return the speed-up over the dense model, as its layers were measured."""
        dense_ms = sum(layer.ms or 0.0 for layer in groups.layers)
        return self.speedup or dense_ms / (self.latency_ms or dense_ms)

    def limit(self, groups: ChannelGroups) -> dict[Quantity, float]:
        """Return the share of the latency to keep; nothing if no speed is asked for."""
        return {"latency": min(1 / self.over(groups), 1.0)} if self.asked else {}


def _checked_targets(
    speed: _Speed, keep: Mapping[Quantity, float] | None, seconds: float, steps: int | None
) -> dict[Quantity, float]:
    if keep is not None and not isinstance(keep, Mapping):
        raise InputError(f"keep must be fractions by quantity, such as {{'macs': 0.5}}, got {keep!r}")
    for name, number in (
        ("speedup", speed.speedup),
        ("latency_ms", speed.latency_ms),
        ("distill_seconds", seconds),
    ):
        if number is None and name != "distill_seconds":
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise InputError(f"{name} must be a number, got {number!r}")
    limits = dict(keep or {})
    allowed = [quantity for quantity in get_args(Quantity) if quantity != "latency"]
    if not speed.asked and not limits:
        raise InputError("there is no target: give speedup, latency_ms or keep, such as keep={'macs': 0.5}")
    if speed.speedup is not None and speed.latency_ms is not None:
        raise InputError("give one of speedup and latency_ms, got both")
    for name, value in (("speedup", speed.speedup), ("latency_ms", speed.latency_ms)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be a finite number > 0, got {value}")
    if speed.speedup is not None and speed.speedup <= 1:
        raise InputError(f"speedup {speed.speedup:g} is met already: it must be above 1")
    for quantity, share in limits.items():
        if quantity not in allowed or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise InputError(
                f"keep must be fractions in (0, 1] of {', '.join(allowed)}, got {quantity}: {share}"
            )
    if not seconds >= 0 or (steps is not None and steps < 0):
        raise InputError(
            f"distill_seconds and distill_steps must be >= 0, got {seconds} and {steps}; 0 leaves that step out"
        )
    if math.isinf(seconds) and steps is None:
        raise InputError("distill_seconds is without end; give distill_steps too")
    return limits


def _check_free(model: nn.Module, groups: ChannelGroups) -> None:
    if groups.free:
        return
    why = "; ".join(f"{group.name}: {group.frozen}" for group in groups.groups[:3])
    raise ModelError(
        f"nothing of {type(model).__name__} can be cut: "
        + (why or "it has no convolution or linear layer in floating point; prune before you quantise")
    )


def _check_reach(groups: ChannelGroups, speed: _Speed, limits: Mapping[Quantity, float]) -> None:
    """Refuse targets that are met already or out of reach, before minutes are spent on them."""
    smallest = Knapsack(groups, all_alike(groups))
    smallest.under(limits)
    if not speed.asked:
        return
    asked, dense_ms = speed.over(groups), sum(layer.ms or 0.0 for layer in groups.layers)
    if asked <= 1:
        raise InputError(
            f"latency_ms {speed.latency_ms:g} is met already: the dense model takes {dense_ms:.3g} ms in ONNX Runtime"
        )
    most = 1 / smallest.least("latency")
    # Predictions are a few per cent off, so only a speed-up far beyond is refused.
    if asked > 1.1 * most:
        raise InputError(
            f"a speed-up of {asked:.3g} is out of reach: with the fewest channels allowed it is predicted to be about "
            f"{most:.3g}; ask for less, or lower min_channels or round_to"
        )


# ------------------------------------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class _Judge:
    """Compares choices by what is left of the outputs after the cut and the repair."""

    dense: nn.Module
    groups: ChannelGroups
    statistics: InputStatistics
    held_out: HeldOut

    def nearest(self, limits: Mapping[Quantity, float], *known: _Known) -> tuple[_Known, float]:
        """Return the importance whose masks leave the outputs nearest to the dense model's, and how near: the KL."""
        found = [(one, self._kl(one, limits)) for one in known]
        return min(found, key=lambda pair: pair[1])

    def _kl(self, known: _Known, limits: Mapping[Quantity, float]) -> float:
        try:
            plan = make_plan(self.groups, Knapsack(self.groups, known).under(limits))
        except InputError:  # gate scores do not let blocks go, so they reach less
            return math.inf
        return self.held_out.of(apply_plan(repair_weights(self.dense, plan, self.statistics), plan)).kl

    def trials(self, known: _Known, limits: Mapping[Quantity, float]) -> Trials:
        """Return trials around the choice under these limits."""
        base = Knapsack(self.groups, known).under(limits)
        return Trials(self.dense, self.groups, self.statistics, self.held_out, base)


def _importance(judge: _Judge, curves: _Known, limits: Mapping[Quantity, float], show: StepDisplay) -> _Known:
    """Return what channels are chosen by: the curves, measured again among the other cuts where much is lost."""
    gates = order_by_gates(judge.groups, judge.statistics.gates)
    known, kl = judge.nearest(limits, curves, gates)
    if kl > _MUCH_LOST and known is curves:
        show.begin("measuring loss curves half way")
        half = {quantity: share**0.5 for quantity, share in limits.items()}
        again = curves_around(judge.trials(known, half), known, progress=show.share)
        known, kl = judge.nearest(limits, known, again)
    if kl > _LITTLE_LOST and known is not gates:
        show.begin("measuring loss curves near the choice")
        near = curves_near(judge.trials(known, limits), known, progress=show.share)
        known, kl = judge.nearest(limits, known, near)
    return known


def _masks(
    known: _Known,
    model: nn.Module,
    groups: ChannelGroups,
    example: Tensor,
    speed: _Speed,
    limits: Mapping[Quantity, float],
    threads: int,
) -> tuple[Masks, SpeedSearch | None]:
    if not speed.asked:
        return Knapsack(groups, known).under(limits), None
    search = search_speed(
        _on_cpu(model),
        groups,
        known,
        example,
        speedup=speed.speedup,
        latency_ms=speed.latency_ms,
        limits=limits,
        threads=threads,
    )
    return search.masks, search


class _Best:
    """The best model so far, and the steps that led to it."""

    def __init__(self, model: nn.Module, divergence: Divergence, started: float, show: StepDisplay) -> None:
        self.model, self.divergence, self._show = model, divergence, show
        self.steps: list[PruneStep] = []
        self._note("choice and cut", started, divergence, True)

    def offer(self, name: str, started: float, model: nn.Module, divergence: Divergence) -> bool:
        """Take a model if its outputs are nearer to the dense model's; returns whether it was taken."""
        taken = divergence.kl < self.divergence.kl
        if taken:
            self.model, self.divergence = model, divergence
        self._note(name, started, divergence, taken)
        return taken

    def _note(self, name: str, started: float, divergence: Divergence, taken: bool) -> None:
        seconds = time.monotonic() - started
        self.steps.append(PruneStep(name, seconds, divergence.kl, divergence.agreement, taken))
        self._show.say(
            f"{name}: {divergence.kl:.4g} nats from the dense model, {divergence.agreement:.3f} of the answers the "
            f"same, {seconds:.0f} s" + ("" if taken else "; not taken")
        )


@dataclass(frozen=True)
class _Work:
    """What every step after the cut works with.

    `used` are the images that may be fitted; so many `at_once` pass with gradients.
    """

    dense: nn.Module
    plan: PrunePlan
    statistics: InputStatistics
    held_out: HeldOut
    used: Tensor
    at_once: int
    seed: int
    show: StepDisplay


def _repair(best: _Best, work: _Work) -> Agreement | None:
    """Offer the cut of the repaired model; returns its proof if it was taken."""
    work.show.begin("repairing")
    started = time.monotonic()
    repaired = repair_weights(work.dense, work.plan, work.statistics)
    candidate = apply_plan(repaired, work.plan)
    proof = verify_cut(repaired, candidate, work.plan)
    return proof if best.offer("closed form", started, candidate, work.held_out.of(candidate)) else None


def _refit(best: _Best, work: _Work) -> None:
    """Offer the model refitted layer by layer, or what is half way to it."""
    work.show.begin("refitting layer by layer")
    started = time.monotonic()
    fitted = refit(
        work.dense,
        best.model,
        work.plan,
        work.statistics.readers,
        work.used,
        work.held_out.stations,
        seed=work.seed,
        progress=work.show.share,
    )
    best.offer("refit layer by layer", started, *work.held_out.better_of_end_and_middle(best.model, fitted))


def _learn(best: _Best, work: _Work, seconds: float, steps: int | None) -> tuple[str, bool]:
    """Offer what the model becomes when it learns; returns what the caller should know, and if Ctrl-C ended it."""
    work.show.begin("learning from the dense model")
    started = time.monotonic()
    try:
        learned = distill(
            work.dense,
            best.model,
            work.plan,
            work.used,
            work.held_out,
            seconds=seconds,
            steps=steps,
            stages=work.held_out.stages,
            at_once=work.at_once,
            seed=work.seed,
            progress=lambda now: work.show.share(now.share, 1.0),
        )
    except TrainingError as error:
        return f"the repaired model was left as it is: {error}", False
    best.offer("learning from the dense model", started, learned.model, learned.divergence)
    if not learned.interrupted:
        return "", False
    return "learning from the dense model was interrupted; what was best until then is returned", True


# -------------------------------------------------------------------------------------------------- small matters


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32, as it is exported."""
    return copy.deepcopy(model).cpu().float()


def _working_copy(
    model: nn.Module, groups: ChannelGroups, example: Tensor
) -> tuple[nn.Module, torch.memory_format]:
    """A copy to work with, in eval mode, and its memory format: the one that is faster for maps, if it runs in it.

    Standardised convolutions whose inputs may go are plain in it, so that they can be masked and repaired.
    """
    copied = copy.deepcopy(model)
    copied.train()  # in steps: the `train` of some timm modules returns nothing
    copied.eval()
    make_readers_plain_(copied, (m.tensor for group in groups.free for m in group.of_role("consumer")))
    tensors = [*copied.parameters(), *copied.buffers()]
    if example.dim() != 4 or any(tensor.dim() == 5 for tensor in tensors):
        return copied, torch.contiguous_format
    faster = copy.deepcopy(copied).to(memory_format=torch.channels_last)
    try:  # a `view` of a map may refuse it
        with evaluating(faster):
            faster(example.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last))
    except Exception:
        return copied, torch.contiguous_format
    return faster, torch.channels_last


def _like(images: Tensor, model: nn.Module) -> Tensor:
    """The images on the device and in the dtype of the model."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(parameter.device, parameter.dtype)


def _split(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images that the steps use, and images kept apart."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n = min(max(round(_KEPT_APART * len(images)), 1), _MOST_KEPT_APART)
    return images[order[n:]], images[order[:n]]


def _batch_size(model: nn.Module, images: Tensor) -> int:
    """How many images a pass with gradients may take at once."""
    total = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        total += sum(t.numel() * t.element_size() for t in flat_tensors(output))

    hooks = [module.register_forward_hook(count) for module in model.modules() if not list(module.children())]
    try:
        with evaluating(model):
            model(images[:1])
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on images of shape {tuple(images.shape[1:])}: {first_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return int(min(max(_STATISTICS_BYTES // max(_HELD_AT_ONCE * total, 1), 1), _LARGEST_BATCH))


def _as_given(pruned: nn.Module, model: nn.Module) -> nn.Module:
    """The pruned model in the usual memory format, with the training flags of the caller's model."""
    flags = {name: module.training for name, module in model.named_modules()}
    pruned = pruned.to(memory_format=torch.contiguous_format)
    for name, module in pruned.named_modules():
        module.training = flags.get(name, model.training)
    return pruned


def _kept(groups: ChannelGroups, masks: Masks) -> dict[Quantity, float]:
    costs = CostModel(groups)
    quantities: tuple[Quantity, ...] = ("macs", "params", "channels")
    return {quantity: costs.share(quantity, masks) for quantity in quantities}


def _few_images(best: _Best, on_used: HeldOut, count: int) -> list[str]:
    """Say so if the outputs on images that were used are much nearer to the dense model's."""
    seen, apart = on_used.of(best.model).kl, best.divergence.kl
    if apart <= _OPTIMISM * seen + _OPTIMISM_KL:
        return []
    return [
        f"the images are few for this model: after the repair its outputs are {apart:.3g} nats from the dense model's "
        f"on images kept apart, and {seen:.3g} on those it was repaired with; give more than {count}"
    ]


def _left_out(statistics: InputStatistics, plan: PrunePlan) -> list[str]:
    """Say which layers lost inputs and were not repaired."""
    lost = {cut.tensor for cut in plan.cuts if cut.role == "consumer"} & set(statistics.left_out)
    return [
        f"{tensor} lost inputs and was not repaired: {statistics.left_out[tensor]}" for tensor in sorted(lost)
    ]
