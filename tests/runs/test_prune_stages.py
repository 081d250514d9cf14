"""The stages that make a pruned model of a dense one, on a few digits: what they learn from, and what a repair adds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from tiny_run import TINY
from torch import Tensor, nn

from sparsekit.artifact.load import load as load_artifact
from sparsekit.errors import InputError
from sparsekit.evaluation import evaluating
from sparsekit.finished.choice import Known
from sparsekit.recipe.reading import load_recipe
from sparsekit.repair.divergence import divergence
from sparsekit.runs import prune_stages
from sparsekit.runs.arguments import build_model, make_accelerator
from sparsekit.runs.choosing import choose_masks
from sparsekit.runs.rehearsal import open_inputs
from sparsekit.runs.results import ChoiceFound, CutResult
from sparsekit.runs.run import Run
from sparsekit.runs.run_directory import RunDirectory
from sparsekit.selection.costs import kept_share
from sparsekit.selection.importance import zero_channels
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks
from sparsekit.training.checkpoint import load_state

SHORT = (
    "data.train_limit=128",
    "sparsify.epochs=2",
    "sparsify.warmup=0.2",
    "sparsify.debias=0.3",
    "dense.baseline=false",
)


def no_tick() -> None:
    """The seconds of a stage are not looked at here."""


def open_run(folder: Path, *overrides: str, dense: Path | None = None) -> Run:
    """A run in a new folder, with the weights of a dense model if they are given."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY)
    recipe = load_recipe(folder / "tiny.yaml", (*SHORT, *overrides))
    files = RunDirectory(folder / "run")
    files.open(resume=False)
    if dense is not None:
        shutil.copy(dense, files.checkpoints)
    return Run(recipe, open_inputs(recipe), files, Accelerator(cpu=True), Console(quiet=True))


@pytest.fixture(scope="module")
def dense(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The weights of a dense model that has learned a little."""

    def make(folder: Path) -> None:
        run = open_run(folder / "dense")
        model = build_model(run.recipe, 10, weights=True)
        run.train(model, run.arguments.phases.dense, "dense", no_tick)
        run.keep_weights(model, "dense")

    return made_once("dense-stage", make) / "dense" / "run" / "checkpoints" / "dense.safetensors"


def with_other_labels(run: Run) -> Run:
    train = run.inputs.data.train
    data = replace(run.inputs.data, train=replace(train, labels=train.labels[::-1].copy()))
    return replace(run, inputs=replace(run.inputs, data=data))


def sparse_weights(run: Run) -> dict[str, Tensor]:
    prune_stages.sparsify(run, no_tick)
    return run.weights("sparse").state_dict()


def test_a_model_that_learns_from_the_dense_one_alone_needs_no_labels(dense: Path, tmp_path: Path) -> None:
    """It starts as its own teacher, and still learns which channels matter least."""
    alone = "sparsify.distill={weight: 1}"
    run = open_run(tmp_path / "a", alone, dense=dense)
    ours = sparse_weights(run)
    theirs = sparse_weights(with_other_labels(open_run(tmp_path / "b", alone, dense=dense)))
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())
    row = run.files.metrics[-1]
    assert row["zero_share"] > 0.1
    # The divergence from a teacher is far below the cross-entropy.
    assert row["loss"] < 0.5 * row["validation_loss"]


@pytest.fixture(scope="module")
def sparse(dense: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The weights of a model with zeros for half of its MACs."""

    def make(folder: Path) -> None:
        prune_stages.sparsify(open_run(folder / "sparse", dense=dense), no_tick)

    return made_once("sparse-stage", make) / "sparse" / "run" / "checkpoints" / "sparse.safetensors"


def cut_run(folder: Path, sparse: Path, *overrides: str) -> tuple[Run, CutResult, float]:
    """Cut the sparse model; returns how far the cut model is from it as well: the KL on validation images."""
    run = open_run(folder, *overrides)
    shutil.copy(sparse, run.files.checkpoints)
    result = prune_stages.cut(run, no_tick)
    images = run.validation_images()
    with (
        evaluating(run.weights("sparse")) as before,
        evaluating(load_artifact(run.files.checkpoints / "cut")) as after,
    ):
        return run, result, divergence([before(images)], [after(images)]).kl


def test_a_repair_makes_up_for_a_cut_that_takes_more_than_the_zeros(sparse: Path, tmp_path: Path) -> None:
    beyond = ("cut.target={macs: 0.3}", "cut.method=budget")
    _, plain, kl = cut_run(tmp_path / "plain", sparse, *beyond)
    run, repaired, repaired_kl = cut_run(
        tmp_path / "repaired", sparse, *beyond, "cut.repair={images: 64, distill_seconds: 0.3}"
    )
    assert plain.removed_live > 0
    assert repaired.layers == plain.layers
    assert repaired.proof_max_rel < 1e-4
    assert repaired_kl < 0.5 * kl
    log = (run.files.path / "run.log").read_text()
    steps = ("cut", "closed form", "refit layer by layer", "learning from the sparse model")
    assert all(f"{step}: " in log for step in steps)
    assert log.count("nats from the sparse model") == len(steps)


def test_a_cut_of_zeros_needs_no_repair_and_takes_no_time_for_it(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_stages, "cut_and_repair", lambda *args, **options: pytest.fail("repaired"))
    run, result, kl = cut_run(tmp_path / "run", sparse, "cut.repair={images: 64}")
    assert result.removed > 0 == result.removed_live
    assert kl < 1e-6
    assert "repair: not needed" in (run.files.path / "run.log").read_text()


def test_processes_wait_for_one_that_works_alone_for_longer_than_it_may(tmp_path: Path) -> None:
    recipe = open_run(tmp_path, "device=cpu", "cut.repair={distill_seconds: 864000}").recipe
    handler = make_accelerator(recipe).init_handler
    assert handler.timeout > timedelta(days=10)


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("cut.repair", ("cut.repair={}",)),
        ("sparsify.importance curves", ("sparsify.importance=curves", "cut.target={speedup: 2}")),
    ],
)
def test_too_few_images_are_told_before_anything_is_trained(
    key: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"{key} needs at least 32 training images, and there are 20"):
        open_run(tmp_path, "data.train_limit=20", *overrides)


def test_masks_by_curves_are_chosen_after_the_warm_up_and_taken_to_zero(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(
        tmp_path / "run",
        *("cut.target={macs: 0.6, params: 0.6}", "sparsify.importance=curves", "sparsify.epochs=3"),
        dense=dense,
    )
    seen: list[Known] = []

    def choose(run: Run, model: nn.Module, groups: ChannelGroups, known: Known) -> tuple[Masks, ChoiceFound]:
        seen.append(known)
        return choose_masks(run, model, groups, known)

    monkeypatch.setattr(prune_stages, "choose_masks", choose)
    found = prune_stages.sparsify(run, no_tick)
    assert [type(curve) for known in seen for curve in known.values()] == [LossCurve] * len(seen[0])
    assert found.choice is not None
    assert found.shortfall == ""
    masks = load_state(run.files.checkpoints / "settled.safetensors")
    model = run.weights("sparse")
    groups = run.find_groups(model)
    left = kept_share(groups, masks)
    assert max(left.macs, left.params) <= 0.6
    zeros = zero_channels(model, groups)
    assert all(bool((zeros[name] >= ~mask).all()) for name, mask in masks.items())
