"""The report of a finished run, made from its journal, metrics and recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from sparsekit.errors import FileError
from sparsekit.latency.compare import Interval, Latency, LatencyComparison
from sparsekit.latency.search import SPEED_TOLERANCE
from sparsekit.recipe.reading import load_recipe
from sparsekit.recipe.recipe import Recipe
from sparsekit.report.page import write_html
from sparsekit.report.schema import (
    AttemptFigures,
    BenchmarkInfo,
    CurvePoint,
    DataInfo,
    EpochCounts,
    GraphFigures,
    IntervalFigures,
    LatencyFigures,
    LayerFigures,
    ModelFigures,
    ModelInfo,
    ParityFigures,
    RunReport,
    SparseFigures,
    StageInfo,
    VariantFigures,
    write_json,
)
from sparsekit.runs.arguments import Target
from sparsekit.runs.results import (
    AttemptsResult,
    BaselineResult,
    BenchmarkResult,
    ChoiceFound,
    DenseFigures,
    DenseResult,
    ExportedModel,
    ExportResult,
    FinetuneResult,
    SparsifyResult,
    TestedCut,
)
from sparsekit.runs.run_directory import RunDirectory, changed_keys

# Answers that are nearly all alike are easy to agree with.
_MOSTLY = 0.9


def write_report(directory: Path) -> RunReport:
    """Write report.json and report.html of the finished run in `directory`. Raises FileError as `build_report` does."""
    report = build_report(directory)
    write_json(report, directory / "report.json")
    write_html(report, directory / "report.html")
    return report


def build_report(directory: Path) -> RunReport:
    """Make the report of the finished run in `directory`.

    Raises FileError if it holds no run, or one whose stages up to the benchmark are not all done.
    """
    files = RunDirectory(directory, writes=False)
    files.open(resume=True)
    if not (directory / "recipe.yaml").exists():
        raise FileError(
            f"the run in {directory} is incomplete: it has no recipe.yaml; copy the whole directory"
        )
    recipe = load_recipe(directory / "recipe.yaml")
    if "dense" not in files.stages and files.is_done("sparsify"):
        raise FileError(
            f"{directory} holds an attempt on the way to a budget of accuracy, not a run; its figures are in the "
            "report of the run that it was made for"
        )
    needed = ("dense", "sparsify", "cut", "finetune", "export", "benchmark")
    open_stages = [name for name in needed if name not in files.stages or files.stages[name].status != "done"]
    if open_stages:
        raise FileError(
            f"the run in {directory} is not finished (open: {', '.join(open_stages)}); go on with --resume"
        )
    try:
        return _assemble(directory, files, recipe)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise FileError(
            f"the journal or the metrics of the run in {directory} are damaged: {error}"
        ) from error


def final_dense(files: RunDirectory) -> DenseFigures:
    """Return the figures that the pruned model is compared with: the baseline's, else those of the dense model."""
    if "baseline" in files.stages:
        return files.result("baseline", BaselineResult).figures
    figures = files.result("dense", DenseResult).figures
    assert figures is not None
    return figures


def _assemble(directory: Path, files: RunDirectory, recipe: Recipe) -> RunReport:
    dense, tested = files.result("dense", DenseResult), files.result("cut", TestedCut)
    finetune, exported = files.result("finetune", FinetuneResult), files.result("export", ExportResult)
    bench = files.result("benchmark", BenchmarkResult)
    latency, config, attempts = bench.latency, dense.config, _attempts(files)
    return RunReport(
        recipe=directory.name if recipe.output is None else recipe.output.name,
        model=_model(recipe, dense),
        data=DataInfo(**asdict(dense.data)),
        input_shape=config.input_size,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        dense=_figures(final_dense(files), exported.dense, latency.latencies[0]),
        pruned=_figures(finetune, exported.pruned, latency.latencies[1]),
        sparse=SparseFigures(
            **asdict(tested.effect),
            near_zero_channels=tested.cut.near_zero_channels,
            channels=tested.cut.channels,
        ),
        speedup=_interval(latency.speedups[0]),
        null=_interval(latency.null),
        parity=ParityFigures(**asdict(exported.pruned.parity)),
        dense_parity=ParityFigures(**asdict(exported.dense.parity)),
        benchmark=_benchmark(latency),
        round_trip_max_abs=finetune.round_trip_max_abs,
        machine=bench.machine,
        seed=recipe.seed,
        versions=bench.versions,
        epochs=_epochs(recipe, with_baseline="baseline" in files.stages),
        stages=tuple(_stages(files)),
        layers=tuple(LayerFigures(**asdict(layer)) for layer in tested.cut.layers),
        curves=tuple(CurvePoint(**row) for row in files.metrics),
        warnings=tuple(_warnings(recipe, files)),
        asked={} if recipe.cut.target is None else recipe.cut.target.model_dump(exclude_none=True),
        variants=tuple(_variants(exported, latency)),
        attempts=_attempt_figures(attempts),
        binds=attempts.binds if attempts else "",
        dense_graph=GraphFigures(**asdict(exported.dense.graph)),
        pruned_graph=GraphFigures(**asdict(exported.pruned.graph)),
    )


def _model(recipe: Recipe, dense: DenseResult) -> ModelInfo:
    own = recipe.model.factory is not None
    args = dense.model_args if own else recipe.model.args
    return ModelInfo(name=recipe.model.label, args=args, own=own)


def _attempts(files: RunDirectory) -> AttemptsResult | None:
    """Return the attempts of a run whose target is a budget of accuracy, else None."""
    return files.result("attempts", AttemptsResult) if files.is_done("attempts") else None


def _figures(
    trained: DenseFigures | FinetuneResult, exported: ExportedModel, latency: Latency
) -> ModelFigures:
    return ModelFigures(
        accuracy=trained.accuracy,
        params=trained.params,
        macs=trained.macs,
        onnx_bytes=exported.onnx_bytes,
        latency_ms=_latency_figures(latency),
        accuracy_onnx=exported.accuracy_onnx,
    )


def _latency_figures(latency: Latency) -> LatencyFigures:
    return LatencyFigures(median=latency.median_ms, p10=latency.p10_ms, p90=latency.p90_ms)


def _interval(interval: Interval) -> IntervalFigures:
    return IntervalFigures(value=interval.value, low=interval.low, high=interval.high)


def _benchmark(latency: LatencyComparison) -> BenchmarkInfo:
    return BenchmarkInfo(
        batch=latency.batch,
        threads=latency.threads,
        rounds=latency.rounds,
        trustworthy=latency.trustworthy,
        reason=latency.reason,
    )


def _epochs(recipe: Recipe, *, with_baseline: bool) -> EpochCounts:
    after = recipe.sparsify.epochs + recipe.finetune.epochs
    return EpochCounts(
        dense=recipe.dense.epochs,
        baseline=after if with_baseline else 0,
        sparsify=recipe.sparsify.epochs,
        finetune=recipe.finetune.epochs,
    )


def _stages(files: RunDirectory) -> Iterator[StageInfo]:
    """Every stage but the one that writes the report."""
    for stage in files.stages.values():
        if stage.name != "report":
            yield StageInfo(name=stage.name, seconds=stage.seconds, status=stage.status)


def _warnings(recipe: Recipe, files: RunDirectory) -> Iterator[str]:
    """Yield what a reader should know before trusting the figures."""
    tested, shortfall = files.result("cut", TestedCut), files.result("sparsify", SparsifyResult).shortfall
    cut, effect, attempts = tested.cut, tested.effect, _attempts(files)
    subject, asked = "The target was not met as asked", "Asked"
    data, final = files.result("dense", DenseResult).data, files.result("finetune", FinetuneResult).accuracy
    yield from lost_accuracy(
        final_dense(files).accuracy,
        effect.accuracy_before_cut,
        effect.accuracy_after_cut,
        final,
        classes=len(data.class_names),
        images=data.test,
    )
    if attempts is not None:
        yield from _accuracy_warnings(recipe, files, attempts)
        subject = "The attempt that was taken did not meet its target"
        asked = "The attempt that was taken asked"
    if shortfall:
        yield f"The penalty fell short of its target: {shortfall}."
    if cut.choice is not None and cut.choice.remark:
        yield f"{subject}: {cut.choice.remark}."
    elif cut.choice is not None:
        yield from _missed_speed(asked, cut.choice, files.result("benchmark", BenchmarkResult).latency)
    if cut.removed_live:
        yield (
            f"{cut.removed_live} of the {cut.removed} channels removed were not zero: the cut was not lossless."
        )
    elif effect.max_abs_logit_change > 1e-4 * effect.max_abs_logit:
        yield (
            "The cut changed the logits although every channel removed was zero: an activation turns zero into a "
            "constant, and a padded convolution sees zeros instead of it at the edges."
        )
    exported = files.result("export", ExportResult)
    pushed_out = exported.pruned.graph.plain - exported.dense.graph.plain
    if pushed_out > 0:
        yield (
            f"The cut pushed {pushed_out} convolutions out of ONNX Runtime's blocked layout, where they are slow: "
            "their channels are no multiple of 4, or their narrow groups cannot be merged; set cut.round_to: auto."
        )
    dense = files.result("dense", DenseResult)
    if not data.labels:
        yield (
            "The images have no labels: every accuracy is the share of images on which a model gives the dense model's "
            "answer."
        )
        if dense.commonest_answer > _MOSTLY:
            yield (
                f"The dense model gives {dense.commonest_answer:.0%} of the test images the same answer, so agreement "
                "with it says little. Check that the weights are those of a trained model, data.mean and data.std, and "
                "that the images are of the kind it was trained for."
            )
    for before, after in pairwise(files.code):
        names = " and ".join(changed_keys(before, after))
        yield (
            f"The code of {names} was changed during the run. Where its dense model had been trained by then, it still "
            "answered as before."
        )
    if (n := data.test) < 1000:
        yield f"The test set has {n} images: one image is {1 / n:.4f} of accuracy."


def lost_accuracy(
    dense: float, sparsified: float, cut: float, pruned: float, *, classes: int, images: int
) -> Iterator[str]:
    """Warn of the first model that knows no more than guessing does, and of one that lost half of what was known.

    The accuracies, on as many test images, are those of the dense model, and of the pruned one before the cut, right
    after it, and at the end.
    """
    chance = 1 / max(classes, 1)
    guessing = chance + 2 * math.sqrt(chance * (1 - chance) / max(images, 1))
    models = {"dense model": dense, "model after sparsify": sparsified, "model after the cut": cut}
    models["pruned model"] = pruned
    hints = {
        "dense model": "what is pruned has not learned; train it for longer, or look at training.lr and the images",
        "model after sparsify": "ask for less in cut.target, lower sparsify.strength or training.lr, or give "
        "sparsify.epochs more",
        "model after the cut": "cut channels that are zero (cut.method auto), or set cut.repair",
        "pruned model": "look at finetune.epochs and finetune.lr",
    }
    for name, accuracy in models.items():
        if accuracy <= guessing:
            yield (
                f"The {name} is right on {accuracy:.4f} of the test images, no more than guessing among {classes} "
                f"classes: {hints[name]}."
            )
            return
    if pruned < chance + (dense - chance) / 2:
        yield (
            f"The pruned model has lost more than half of what the dense one knew: {pruned:.4f} of {dense:.4f}, where "
            f"guessing gives {chance:.4f}. Ask for less in cut.target, or train for longer."
        )


def _accuracy_warnings(recipe: Recipe, files: RunDirectory, found: AttemptsResult) -> Iterator[str]:
    """Warn of a budget of accuracy that was not met, or is finer than the validation images can tell."""
    if found.remark:
        yield f"The target was not met as asked: {found.remark}."
    n = files.result("dense", DenseResult).data.validation
    budget = Target.of(recipe.cut.target).max_accuracy_drop or 0.0
    # A model at the edge of the budget; the dense one may be right on all of them, as it is where it gave the labels.
    accuracy = min(found.dense_accuracy, 1 - budget)
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    if budget < error:
        yield (
            f"The validation set has {n} images: its accuracy is known to {error:.4f} (standard error), and "
            f"max_accuracy_drop is {budget:g}. Which attempts are within the budget is partly chance."
        )


def _missed_speed(asked: str, choice: ChoiceFound, latency: LatencyComparison) -> Iterator[str]:
    """Warn if the benchmark misses the speed-up that was asked for, though the choice of channels met it."""
    measured = latency.speedups[0].value
    if choice.asked is None or choice.found is None or abs(measured / choice.asked - 1) <= SPEED_TOLERANCE:
        return
    yield (
        f"{asked} for a speed-up of {choice.asked:.3g}, the benchmark measured {measured:.3g}. When the channels "
        f"were chosen, {choice.found.measured:.3g} was measured for them: two measurements on this machine differ by "
        "that much."
    )


def _variants(exported: ExportResult, latency: LatencyComparison) -> Iterator[VariantFigures]:
    """Yield the models in fewer bits. They were timed after the dense and the pruned one."""
    timed = zip(exported.variants, latency.latencies[2:], latency.speedups[1:], strict=True)
    for variant, measured, speedup in timed:
        yield VariantFigures(
            **asdict(variant), latency_ms=_latency_figures(measured), speedup=_interval(speedup)
        )


def _attempt_figures(found: AttemptsResult | None) -> tuple[AttemptFigures, ...]:
    figures = []
    for one in found.attempts if found else ():
        plain = asdict(one)
        del plain["pressure"]
        figures.append(AttemptFigures(**plain, taken=found is not None and one.number == found.taken))
    return tuple(figures)
