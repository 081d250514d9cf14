"""Make up for a cut: repair, refit and learning in turn, each judged on images kept apart; no labels."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from rich.console import Console
from torch import Tensor, nn

from sparsekit.finished.display import StepDisplay
from sparsekit.finished.images import collect_images
from sparsekit.finished.preparation import as_given, prepare
from sparsekit.finished.steps import Best, PruneStep, Work, learning_step, refit_step, repair_step
from sparsekit.repair.divergence import Divergence
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.statistics import InputStatistics
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.verify import Agreement, verify_cut

# Outputs on images that were used may be nearer to those before the cut by this much before more images are asked for.
_OPTIMISM, _OPTIMISM_KL = 2.0, 0.02
# A classifier whose largest probability is below this on average hardly knows what it is shown: so it is with the
# images of another kind in benchmarks/finished_model.py, whose page quotes the remark.
_UNSURE = 0.3


@dataclass(frozen=True)
class RepairedCut:
    """A model that was cut, and made up for it.

    - `proof` says how exactly the cut model computed what the masked one does.
    - `divergence` compares the outputs with those before the cut on images kept apart; `steps` led there.
    - `remarks` is what the caller should know; `interrupted` says whether Ctrl-C ended the learning.
    """

    model: nn.Module
    proof: Agreement
    divergence: Divergence
    steps: tuple[PruneStep, ...]
    remarks: tuple[str, ...]
    interrupted: bool


def repair_cut(
    work: Work, name: str, started: float, *, seconds: float, steps: int | None = None
) -> RepairedCut:
    """Cut by the plan of `work`, prove it, and take the steps that bring the outputs nearer.

    `name` is that of the first step, the cut itself, which began at `started`. The model learns for `seconds`, or for
    `steps` where these are given. Raises VerificationError if the cut cannot be proved.
    """
    one, plan = work.prepared, work.plan
    pruned = apply_plan(one.dense, plan)
    proof = verify_cut(one.dense, pruned, plan)
    best = Best(name, started, pruned, one.held_out.of(pruned), work)
    proof = repair_step(best, work) or proof
    seen = HeldOut(
        one.dense, one.groups, (one.used[: one.held_out.n_images],), recorded=0, kind=one.held_out.kind
    )
    remarks = [*_other_outputs(one.held_out), *_unsure(one.held_out), *_few_images(best, seen, work)]
    refit_step(best, work)
    interrupted = False
    if seconds > 0 and steps != 0:
        remark, interrupted = learning_step(best, work, seconds, steps)
        remarks += [remark] if remark else []
    return RepairedCut(
        best.model,
        proof,
        best.divergence,
        tuple(best.steps),
        (*remarks, *_left_out(one.statistics, plan)),
        interrupted,
    )


def cut_and_repair(
    model: nn.Module,
    groups: ChannelGroups,
    plan: PrunePlan,
    images: Tensor,
    *,
    seconds: float,
    seed: int = 0,
    console: Console | None = None,
) -> RepairedCut:
    """Cut a sparse model by its plan, and make up for what was not zero with some images; no labels are needed.

    The cut model learns from the sparse one for `seconds`. `model` is not changed; the result has its device, dtype and
    training flags. Raises DataError for images, ModelError for a model that does not run on them, VerificationError if
    the cut cannot be proved.
    """
    with StepDisplay(console) as show:
        prepared = prepare(model, groups, collect_images(images, most=len(images)), show, seed=seed)
        prepared.held_out.forget()
        work = Work(prepared, plan, show, teacher="the sparse model")
        repaired = repair_cut(work, "cut", time.monotonic(), seconds=seconds)
    return replace(repaired, model=as_given(repaired.model, model))


def _other_outputs(held_out: HeldOut) -> list[str]:
    """Say so if the outputs were compared as scores of classes and are probably none."""
    if not held_out.look_like_values:
        return []
    return [
        "the outputs were taken for scores of classes, and all classes are about as likely: if they are an embedding "
        'or a regression, use sparsekit.prune with outputs="values", or what the cut changes in them is not seen'
    ]


def _unsure(held_out: HeldOut) -> list[str]:
    """Say so if the model hardly knows these images: they may be of another kind than those it was trained on."""
    confidence = held_out.confidence
    if held_out.look_like_values or not confidence < _UNSURE:
        return []
    return [
        f"the model is not sure of its answers on these images: its largest probability is {confidence:.2f} "
        "on average; if they are of another kind than those it will see, give some of those, or what it loses on them "
        "is not seen"
    ]


def _few_images(best: Best, on_used: HeldOut, work: Work) -> list[str]:
    """Say so if the outputs on images that were used are much nearer to those before the cut."""
    seen, apart = on_used.of(best.model).kl, best.divergence.kl
    if apart <= _OPTIMISM * seen + _OPTIMISM_KL:
        return []
    return [
        f"the images are few for this model: after the repair its outputs are {apart:.3g} nats from {work.teacher}'s "
        f"on images kept apart, and {seen:.3g} on those it was repaired with; give more than {work.prepared.n_images}"
    ]


def _left_out(statistics: InputStatistics, plan: PrunePlan) -> list[str]:
    """Say which layers lost inputs and were not repaired."""
    lost = {cut.tensor for cut in plan.cuts if cut.role == "consumer"} & set(statistics.left_out)
    return [
        f"{tensor} lost inputs and was not repaired: {statistics.left_out[tensor]}" for tensor in sorted(lost)
    ]
