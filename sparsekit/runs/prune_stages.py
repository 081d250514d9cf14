"""The stages sparsify, cut and finetune, which make a pruned model of a dense one. None sees a test image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparsekit.artifact.format import read_structure
from sparsekit.errors import InputError
from sparsekit.evaluation import as_inputs
from sparsekit.finished.preparation import Options
from sparsekit.finished.prune_model import PruneResult, prune
from sparsekit.finished.repair_cut import RepairedCut, cut_and_repair
from sparsekit.recipe.specs import FinetuneSpec, SparsifySpec
from sparsekit.runs.arguments import make_sparsifier
from sparsekit.runs.choosing import channel_costs, choose_masks, cut_masks, measured_curves, with_latencies
from sparsekit.runs.rehearsal import training_images
from sparsekit.runs.results import ChoiceFound, CutResult, LayerKept, SparsifyResult, as_json, from_json
from sparsekit.runs.run import Run
from sparsekit.selection.carriers import keep_carriers
from sparsekit.selection.importance import zero_channels
from sparsekit.sparsify.late_choice import LateChoice
from sparsekit.sparsify.sparsifier import Sparsifier
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.masks import Masks, Scores
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.verify import Agreement, agreement, outputs, verify_cut
from sparsekit.training.checkpoint import save_state
from sparsekit.training.loop import steps_per_epoch
from sparsekit.training.options import Distillation

# Outputs are the same if they differ by no more than this share of the largest, on so many images.
_SAME, _COMPARED_IMAGES = 1e-4, 64


class NothingToCutError(InputError):
    """No channel was chosen to go."""


def sparsify(run: Run, tick: Callable[[], None]) -> SparsifyResult:
    """Train with the penalty until channels are exactly zero."""
    model = run.weights("dense")
    groups = run.find_groups(model)
    hook = _hook(run, model, groups) if run.recipe.sparsify.epochs else None
    teacher = _teacher(run, run.recipe.sparsify)
    run.train(model, run.arguments.phases.sparsify, "sparsify", tick, hook=hook, teacher=teacher)
    late = hook if isinstance(hook, LateChoice) and hook.masks else None
    if late is not None and run.files.writes:
        save_state(run.files.checkpoints / "settled.safetensors", late.masks)
    run.keep_weights(model, "sparse")
    return SparsifyResult(
        zero_channels=sum(int(dead.sum()) for dead in zero_channels(model, groups).values()),
        channels=sum(group.n_channels for group in groups.free),
        shortfall="" if hook is None else hook.shortfall(),
        choice=None if late is None else from_json(ChoiceFound, late.notes),
    )


def cut(run: Run, tick: Callable[[], None]) -> CutResult:
    """Choose masks, make the plan, cut, and prove it. The cut model is left in checkpoints/cut."""
    model = run.weights("sparse")
    if run.arguments.finished is not None:
        return _prune_finished(run, model, run.arguments.finished)
    groups = run.find_groups(model)
    masks, choice = cut_masks(run, model, groups)
    if choice is not None:
        groups = _with_multiples(groups, choice.multiples)
    masks = keep_carriers(model, groups, masks)
    plan = make_plan(groups, masks)
    if not (plan.cuts or plan.blocks):
        raise NothingToCutError(
            "cut: nothing to remove: no group has a whole step of channels that are zero or of little importance; set "
            "cut.target, raise sparsify.strength, or lower cut.round_to"
        )
    pruned = apply_plan(model, plan)
    proof = verify_cut(model, pruned, plan)
    if run.recipe.cut.repair is not None:
        repaired = run.by_the_first(lambda: _repaired(run, model, pruned, groups, plan))
        if repaired is None:
            run.say("repair: not needed: the outputs are the same without the channels that go")
        else:
            _tell_repair(run, repaired, "the sparse model")
            pruned, proof = repaired.model, repaired.proof
    run.save_artifact(pruned, run.files.checkpoints / "cut", plan, {})
    return _result(model, groups, masks, plan, proof, choice)


def _repaired(
    run: Run, model: nn.Module, pruned: nn.Module, groups: ChannelGroups, plan: PrunePlan
) -> RepairedCut | None:
    """Make up for the cut of a sparse model with training images, without labels; None if it lost nothing."""
    repair = run.recipe.cut.repair
    assert repair is not None
    images = training_images(run.recipe, run.inputs, repair.images)
    if _loses_nothing(model, pruned, images):
        return None
    repaired = cut_and_repair(
        model,
        groups,
        plan,
        images,
        seconds=repair.distill_seconds,
        seed=run.recipe.seed,
        console=run.console,
    )
    # All processes get it: on one GPU there may be no room for so many.
    return replace(repaired, model=repaired.model.cpu())


def _loses_nothing(model: nn.Module, pruned: nn.Module, images: Tensor) -> bool:
    """Whether the cut model answers to some images as the sparse one does: what went was zero."""
    seen = as_inputs(images[:_COMPARED_IMAGES].to(next(model.parameters()).device))
    return agreement(outputs(model, seen), outputs(pruned, seen)).max_rel <= _SAME


def _prune_finished(run: Run, model: nn.Module, options: Options) -> CutResult:
    """Prune a finished model with training images, whose labels are not used (`sparsekit.prune`)."""
    repair, target = run.recipe.cut.repair, run.arguments.target
    assert repair is not None
    images = training_images(run.recipe, run.inputs, repair.images)

    def prune_it() -> PruneResult:
        pruned = prune(
            model,
            images,
            speedup=target.speedup,
            latency_ms=target.latency_ms,
            keep=target.limits,
            distill_seconds=repair.distill_seconds,
            console=run.console,
            **vars(options),
        )
        return replace(pruned, model=pruned.model.cpu())

    found = run.by_the_first(prune_it)
    _tell_repair(run, found, "the dense model")
    run.save_artifact(found.model, run.files.checkpoints / "cut", found.plan, {})
    search = found.speed
    multiples = {group.name: group.rounding.multiple for group in found.groups.free}
    choice = ChoiceFound(multiples)
    if search is not None:
        choice = ChoiceFound(multiples, search.asked, search.found, search.trials, search.remark)
    return _result(model, found.groups, found.masks, found.plan, found.proof, choice)


def _tell_repair(run: Run, found: RepairedCut | PruneResult, teacher: str) -> None:
    """Note what each step brought. Raises KeyboardInterrupt if Ctrl-C ended the learning."""
    if found.interrupted:  # the stage is not done: --resume makes it again
        raise KeyboardInterrupt
    for step in found.steps:
        run.files.log(
            f"{step.name}: {step.kl:.4g} nats from {teacher}" + ("" if step.taken else "; not taken")
        )
    for remark in found.remarks:
        run.say(f"repair: {remark}")


def _result(
    model: nn.Module,
    groups: ChannelGroups,
    masks: Masks,
    plan: PrunePlan,
    proof: Agreement,
    choice: ChoiceFound | None,
) -> CutResult:
    zeros = zero_channels(model, groups)
    kept = {group.name: _kept(group, masks, plan) for group in groups}
    return CutResult(
        proof_max_rel=proof.max_rel,
        near_zero_channels=sum(int(dead.sum()) for dead in zeros.values()),
        channels=sum(len(mask) for mask in masks.values()),
        removed=sum(group.n_channels - kept[group.name] for group in groups.free),
        removed_live=sum(int((~masks[name] & ~dead).sum()) for name, dead in zeros.items()),
        choice=choice,
        layers=tuple(LayerKept(g.name, g.n_channels, kept[g.name], g.frozen) for g in groups),
    )


def finetune(run: Run, tick: Callable[[], None]) -> tuple[nn.Module, PrunePlan]:
    """Train the cut model without a penalty; returns it, on the device, and the plan it was cut by."""
    folder = run.files.checkpoints / "cut"
    model = run.load_artifact(folder).to(run.accelerator.device)
    run.recalibrate(model)
    teacher = _teacher(run, run.recipe.finetune)
    run.train(model, run.arguments.phases.finetune, "finetune", tick, teacher=teacher)
    return model, PrunePlan.from_json(read_structure(folder)["plan"])


def _teacher(run: Run, phase: SparsifySpec | FinetuneSpec) -> Distillation | None:
    """Return the dense model as the teacher of a phase; None where the recipe does not ask for one."""
    if phase.distill is None or not phase.epochs:
        return None
    return Distillation(run.final_dense(), phase.distill.weight, phase.distill.temperature)


def _hook(run: Run, model: nn.Module, groups: ChannelGroups) -> Sparsifier | LateChoice:
    """Make the Sparsifier. Where the knapsack chooses the masks, it gets them when the warm-up is over."""
    options, loader = run.arguments.phases.sparsify, run.loader(run.inputs.data.train, True)
    steps = options.epochs * steps_per_epoch(loader, options, run.accelerator)
    costs = channel_costs(run, model, groups)
    sparsifier = make_sparsifier(run.recipe, model, groups, total_steps=steps, costs=costs)
    spec = run.recipe.sparsify
    if spec.strength != "auto" or not run.arguments.target.takes_knapsack:
        return sparsifier
    measured = with_latencies(run, model, groups)

    def choose(importance: Scores) -> tuple[Masks, Mapping[str, Any]]:
        by_curves = spec.importance == "curves"
        known = measured_curves(run, model, groups, importance) if by_curves else importance
        masks, found = choose_masks(run, model, measured, known)
        return masks, as_json(found)

    return LateChoice(sparsifier, max(round(steps * spec.warmup), 1), choose)


def _with_multiples(groups: ChannelGroups, multiples: Mapping[str, int]) -> ChannelGroups:
    """Return the groups, rounded to the multiples in which their masks were chosen."""
    rounded = [
        replace(g, rounding=replace(g.rounding, multiple=multiples[g.name])) if g.name in multiples else g
        for g in groups
    ]
    return replace(groups, groups=tuple(rounded))


def _kept(group: ChannelGroup, masks: Masks, plan: PrunePlan) -> int:
    if any(group.lies_in(block.module) for block in plan.blocks):
        return 0
    return int(masks[group.name].sum()) if group.name in masks else group.n_channels
