"""The steps after the cut: repair, refit and learning, each taken only if it brings the outputs nearer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from torch import nn

from sparsekit.errors import TrainingError
from sparsekit.finished.display import StepDisplay
from sparsekit.finished.preparation import Prepared
from sparsekit.repair.closed_form import repair_weights
from sparsekit.repair.distillation import distill
from sparsekit.repair.divergence import Divergence
from sparsekit.repair.refit import refit
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.verify import Agreement, verify_cut


@dataclass(frozen=True)
class PruneStep:
    """One step: its name, what it took, and how far the outputs are from those before the cut after it.

    `taken` is False if the step before was nearer, and its model was kept.
    """

    name: str
    seconds: float
    kl: float
    agreement: float
    taken: bool = True


@dataclass(frozen=True)
class Work:
    """What every step after the cut works with. `teacher` is, in words, the model before the cut."""

    prepared: Prepared
    plan: PrunePlan
    show: StepDisplay
    teacher: str = "the dense model"


class Best:
    """The best model so far, and the steps that led to it."""

    def __init__(
        self, name: str, started: float, model: nn.Module, divergence: Divergence, work: Work
    ) -> None:
        self.model, self.divergence, self._work = model, divergence, work
        self.steps: list[PruneStep] = []
        self._note(name, started, divergence, True)

    def offer(self, name: str, started: float, model: nn.Module, divergence: Divergence) -> bool:
        """Take a model if its outputs are nearer to those before the cut; returns whether it was taken."""
        taken = divergence.kl < self.divergence.kl
        if taken:
            self.model, self.divergence = model, divergence
        self._note(name, started, divergence, taken)
        return taken

    def _note(self, name: str, started: float, divergence: Divergence, taken: bool) -> None:
        seconds = time.monotonic() - started
        self.steps.append(PruneStep(name, seconds, divergence.kl, divergence.agreement, taken))
        same = f", {divergence.agreement:.3f} of the answers the same"
        if math.isnan(divergence.agreement):  # outputs that are no classes
            same = ""
        self._work.show.say(
            f"{name}: {divergence.kl:.4g} nats from {self._work.teacher}{same}, {seconds:.0f} s"
            + ("" if taken else "; not taken")
        )


def repair_step(best: Best, work: Work) -> Agreement | None:
    """Offer the cut of the repaired model; returns its proof if it was taken."""
    one = work.prepared
    work.show.begin("repairing")
    started = time.monotonic()
    repaired = repair_weights(one.dense, work.plan, one.statistics)
    candidate = apply_plan(repaired, work.plan)
    proof = verify_cut(repaired, candidate, work.plan)
    return proof if best.offer("closed form", started, candidate, one.held_out.of(candidate)) else None


def refit_step(best: Best, work: Work) -> None:
    """Offer the model refitted layer by layer, or what lies on the way to it."""
    one = work.prepared
    work.show.begin("refitting layer by layer")
    started = time.monotonic()
    fitted = refit(
        one.dense,
        best.model,
        work.plan,
        one.statistics.readers,
        one.used,
        one.held_out.stations,
        seed=one.seed,
        progress=work.show.share,
    )
    best.offer("refit layer by layer", started, *one.held_out.nearest_between(best.model, fitted))


def learning_step(best: Best, work: Work, seconds: float, steps: int | None) -> tuple[str, bool]:
    """Offer what the model becomes when it learns; returns what the caller should know, and if Ctrl-C ended it."""
    one = work.prepared
    name = f"learning from {work.teacher}"
    work.show.begin(name)
    started = time.monotonic()
    try:
        learned = distill(
            one.dense,
            best.model,
            work.plan,
            one.used,
            one.held_out,
            seconds=seconds,
            steps=steps,
            stages=one.held_out.stages,
            at_once=one.at_once,
            seed=one.seed,
            progress=lambda now: work.show.share(now.share, 1.0),
        )
    except TrainingError as error:
        return f"the repaired model was left as it is: {error}", False
    best.offer(name, started, learned.model, learned.divergence)
    if not learned.interrupted:
        return "", False
    return f"{name} was interrupted; what was best until then is returned", True
