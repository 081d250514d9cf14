"""The stages that make a pruned model of a dense one: sparsify, cut, fine-tune. None of them sees a test image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sparsekit.artifact.format import read_structure
from sparsekit.artifact.load import load as load_artifact
from sparsekit.errors import InputError
from sparsekit.runs.arguments import channel_rounding, make_sparsifier, train_options, wants_choice
from sparsekit.runs.choosing import channel_costs, choose_masks, cut_masks, with_latencies
from sparsekit.runs.run import Run
from sparsekit.selection.carriers import keep_carriers
from sparsekit.selection.importance import zero_channels
from sparsekit.sparsify.late_choice import Settling
from sparsekit.sparsify.sparsifier import Sparsifier
from sparsekit.structure.groups import ChannelGroup
from sparsekit.structure.masks import Masks
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.verify import verify_cut
from sparsekit.training.checkpoint import save_state
from sparsekit.training.loop import steps_per_epoch
from sparsekit.training.options import Distillation


class NothingToCutError(InputError):
    """What was chosen to go is nothing."""


def sparsify(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train with the penalty until channels are exactly zero."""
    spec = run.recipe.sparsify
    model = run.weights("dense")
    groups = run.find_groups(model)
    hook: Sparsifier | Settling | None = None
    if spec.epochs:
        options, loader = train_options(run.recipe, spec), run.loader(run.inputs.data.train, True)
        steps = spec.epochs * steps_per_epoch(loader, options, run.accelerator)
        costs = channel_costs(run, model, groups)
        sparsifier = make_sparsifier(run.recipe, model, groups, total_steps=steps, costs=costs)
        hook = sparsifier
        if spec.strength == "auto" and wants_choice(run.recipe):
            measured = with_latencies(run, model, groups)
            at = max(round(steps * spec.warmup), 1)
            hook = Settling(sparsifier, at, lambda worth: choose_masks(run, model, measured, worth))
        run.train(model, spec, "sparsify", tick, hook=hook)
    settled = hook if isinstance(hook, Settling) else None
    if settled is not None and run.files.writes:
        save_state(run.files.checkpoints / "settled.safetensors", settled.masks)
    run.keep_weights(model, "sparse")
    zeros = sum(int(dead.sum()) for dead in zero_channels(model, groups).values())
    channels = sum(group.n_channels for group in groups.free)
    return {
        "zero_channels": zeros,
        "channels": channels,
        "shortfall": "" if hook is None else hook.shortfall(),
        "choice": {} if settled is None else dict(settled.notes),
    }


def cut(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Scores, masks, plan, surgery, proof; leaves the cut model in checkpoints/cut."""
    model = run.weights("sparse")
    groups = run.find_groups(model)
    masks, choice = cut_masks(run, model, groups)
    multiples = choice.get("multiples") or channel_rounding(run.recipe)
    masks = keep_carriers(model, groups, masks, round_to=multiples)
    plan = make_plan(groups, masks)
    if not (plan.cuts or plan.blocks):
        raise NothingToCutError(
            f"cut: nothing to remove: in no group {channel_rounding(run.recipe)} channels are zero or score too low; "
            "set cut.target, raise sparsify.strength, or lower cut.round_to"
        )
    pruned = apply_plan(model, plan)
    proof = verify_cut(model, pruned, plan)
    run.save_artifact(pruned, run.files.checkpoints / "cut", plan, {})
    zeros = zero_channels(model, groups)
    live = sum(int((~masks[name] & ~dead).sum()) for name, dead in zeros.items())
    return {
        "proof_max_rel": proof.max_rel,
        "near_zero_channels": sum(int(dead.sum()) for dead in zeros.values()),
        "channels": sum(len(mask) for mask in masks.values()),
        "removed": sum(group.n_channels - _kept(group, masks, plan) for group in groups.free),
        "removed_live": live,
        "choice": choice,
        "layers": [
            {
                "name": group.name,
                "channels": group.n_channels,
                "kept": _kept(group, masks, plan),
                "reason": group.frozen,
            }
            for group in groups
        ],
    }


def _kept(group: ChannelGroup, masks: Masks, plan: PrunePlan) -> int:
    if any(group.lies_in(block.module) for block in plan.blocks):
        return 0
    return int(masks[group.name].sum()) if group.name in masks else group.n_channels


def finetune(run: Run, tick: Callable[[], None]) -> tuple[nn.Module, PrunePlan]:
    """Train the cut model without penalty; returns it, on the device, with the plan it was cut by."""
    spec = run.recipe.finetune
    cut = run.files.checkpoints / "cut"
    model = load_artifact(cut).to(run.accelerator.device)
    run.recalibrate(model)
    teacher = None
    if spec.distill is not None and spec.epochs:
        teacher = Distillation(run.final_dense(), spec.distill.weight, spec.distill.temperature)
    run.train(model, spec, "finetune", tick, teacher=teacher)
    return model, PrunePlan.from_json(read_structure(cut)["plan"])
