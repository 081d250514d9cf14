"""`sk.prune`: the one call for a finished model and a few hundred images, as a story.

    groups -> latencies -> statistics -> curves -> choice -> cut and repair -> learning from the dense model

Each step is judged on images kept apart, and taken only if it brings the outputs nearer to the dense model's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.finished.choice import choose_importance, choose_masks
from sparsekit.finished.display import StepDisplay
from sparsekit.finished.preparation import Options, as_given, measure
from sparsekit.finished.repair_cut import repair_cut
from sparsekit.finished.steps import PruneStep, Work
from sparsekit.finished.targets import Speed, check_reach, checked_targets
from sparsekit.latency.search import SpeedSearch
from sparsekit.options import FinishedImportance, Outputs, Quantity, RoundTo
from sparsekit.selection.costs import CostModel
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.verify import Agreement

__all__ = ["PruneResult", "prune"]


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
    importance: FinishedImportance = "greedy",
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
    outputs: Outputs = "classes",
    seed: int = 0,
    console: Console | None = None,
) -> PruneResult:
    """Make a finished model faster with a few hundred images of the kind it will see; no labels are needed.

    `images` are normalised as the model expects them: a tensor, an iterable of batches, or a DataLoader, whose labels
    are ignored; the first `max_images` are read, so shuffle them. At least one target is needed, and all that are given
    hold: `speedup` or `latency_ms` in ONNX Runtime on this machine with `threads`, at `batch_size`; `keep`, fractions
    of "macs", "params" or "channels" to keep at most. `importance` says in which order the channels of a group go:
    "greedy", next the one whose removal costs least after least squares; "lasso", the last to enter the path of the
    LASSO on what channels bring to the layers that read them (He, Zhang and Sun 2017). `ignore` names modules to leave
    whole, `blocks` lets whole residual blocks go too, and `round_to`, `min_channels` and `through_layer_norm` are those
    of `find_groups`. `outputs` "values" says that an output of two dimensions is no scores of classes, but an embedding
    or a regression.

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
    speed = Speed(speedup, latency_ms)
    limits = checked_targets(speed, keep, distill_seconds, distill_steps)
    options = Options(
        importance=importance,
        ignore=ignore,
        threads=threads,
        batch_size=batch_size,
        blocks=blocks,
        through_layer_norm=through_layer_norm,
        round_to=round_to,
        min_channels=min_channels,
        max_images=max_images,
        outputs=outputs,
        seed=seed,
    )
    with StepDisplay(console) as show:
        measured = measure(
            model,
            images,
            options,
            show,
            latencies=speed.asked,
            check=lambda groups: check_reach(groups, speed, limits),
        )
        del images
        started, one = time.monotonic(), measured.prepared
        known = choose_importance(measured, limits | speed.limit(one.groups), show)
        one.held_out.forget()
        show.begin("choosing channels")
        masks, search = choose_masks(known, measured, speed, limits)
        plan = make_plan(one.groups, masks)
        if not (plan.cuts or plan.blocks):
            raise InputError(
                "nothing was cut: no group can lose a whole step of channels under this target; ask for more, or lower "
                "round_to or min_channels"
            )
        repaired = repair_cut(
            Work(one, plan, show), "choice and cut", started, seconds=distill_seconds, steps=distill_steps
        )
    return PruneResult(
        model=as_given(repaired.model, model),
        plan=plan,
        groups=one.groups,
        masks=masks,
        proof=repaired.proof,
        speed=search,
        kl=repaired.divergence.kl,
        agreement=repaired.divergence.agreement,
        steps=repaired.steps,
        kept=_kept(one.groups, masks),
        seconds=time.monotonic() - called,
        remarks=(*repaired.remarks, *([search.remark] if search and search.remark else [])),
        interrupted=repaired.interrupted,
    )


def _kept(groups: ChannelGroups, masks: Masks) -> dict[Quantity, float]:
    costs = CostModel(groups)
    quantities: tuple[Quantity, ...] = ("macs", "params", "channels")
    return {quantity: costs.share(quantity, masks) for quantity in quantities}
