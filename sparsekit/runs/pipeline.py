"""The story of a run, one stage after the other.

    dense -> baseline -> sparsify -> cut -> finetune -> export -> benchmark -> report

The pruned model is compared with the baseline, and learns from it where the recipe says so. Where the target is a
budget of accuracy, attempts at several speed-ups come after the baseline. The stages sparsify, cut and finetune then
copy the attempt that is taken.

Every stage is in the journal of the run directory. A resumed run skips the stages that are done and continues a
training stage after its last completed epoch. Stages pass on files (weights, artifacts, ONNX) and results in the
journal, so that a resumed run reads the same as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from torch import nn

from sparsekit.artifact.load import check_round_trip
from sparsekit.errors import VerificationError
from sparsekit.evaluation import comparing
from sparsekit.export.graph_summary import summarise_graph
from sparsekit.export.onnx_file import export_onnx, metadata_texts, read_metadata
from sparsekit.export.parity import check_parity, onnx_accuracy
from sparsekit.export.precision import convert_to_fp16, quantize_to_int8
from sparsekit.files import write_text
from sparsekit.latency.compare import compare_latency
from sparsekit.machine import describe_machine, library_versions
from sparsekit.options import Precision
from sparsekit.recipe.reading import dump_recipe
from sparsekit.recipe.recipe import Recipe
from sparsekit.report.schema import RunReport
from sparsekit.runs import attempts, own_code, prune_stages
from sparsekit.runs.accuracy_search import full_target
from sparsekit.runs.arguments import Arguments, build_model, make_accelerator
from sparsekit.runs.choosing import check_speed
from sparsekit.runs.rehearsal import open_inputs
from sparsekit.runs.report_assembly import build_report, final_dense, write_report
from sparsekit.runs.results import (
    BaselineResult,
    BenchmarkResult,
    CutEffect,
    CutResult,
    DataFound,
    DenseFigures,
    DenseResult,
    ExportedModel,
    ExportedVariant,
    ExportResult,
    FinetuneResult,
    Nothing,
    TestedCut,
)
from sparsekit.runs.run import Run
from sparsekit.runs.run_directory import RunDirectory
from sparsekit.runs.stages import Stage, artifact, run_stage
from sparsekit.structure.counting import count_macs, count_params
from sparsekit.structure.plan import PrunePlan
from sparsekit.training.data_sources import Images

# Float32 kernels that add in another order differ by 1e-6. Ten times the largest difference seen is a wrong graph.
_PARITY_LIMIT = 1e-3


# -------------------------------------------------------------------------------------------------- the story


def prune(recipe: Recipe, *, output: Path, resume: bool, console: Console) -> RunReport:
    """Run a recipe in the directory `output` and return its report.

    Raises:
        InputError: the model, the data or the target of the recipe has a problem; all in one message.
        FileError: the directory already holds a run, or none to resume.
        TrainingError: the loss is not finite.
        VerificationError: a proof failed.
    """
    inputs = open_inputs(recipe)
    accelerator = make_accelerator(recipe)
    files = RunDirectory(output, writes=accelerator.is_main_process, locks=True)
    with closing(files):
        with accelerator.main_process_first():  # the others find the directory that the main process opened
            files.open(resume=resume or not files.writes)
        run = Run(recipe, inputs, files, accelerator, console)
        for remark in files.remarks:
            run.say(remark)
        story = _story(run.arguments)
        for stage in story:  # before anything is written, so that a refused resume changes nothing
            files.check_settings(stage.name, stage.settings(run))
        own_code.check_code(run)
        if files.writes:
            write_text(output / "recipe.yaml", dump_recipe(recipe))
        if not files.is_done("cut"):
            _check_target(run)
        for stage in story:
            run_stage(run, stage)
        return build_report(output)


def _check_target(run: Run) -> None:
    """Refuse a target that is out of reach, or met already, before anything is trained for it."""
    target = run.arguments.target
    if target.is_speed or target.takes_attempts:
        dense_ms, most = check_speed(run)
        if target.takes_attempts and not run.files.is_done("attempts"):
            full_target(target, dense_ms, most)


# ----------------------------------------------------------------------------------------------- the stages


def _story(arguments: Arguments) -> list[Stage]:
    """List the stages in order. For a budget of accuracy three of them copy the attempt that is taken."""
    weights = "checkpoints/{}.safetensors".format
    lengths = [
        f"{phase}.{key}"
        for phase in ("sparsify", "finetune")
        for key in ("epochs", "lr", "warmup_epochs", "schedule")
    ]
    dense = Stage("dense", _train_dense, ("model", "data", "training", "dense"), (weights("dense"),))
    baseline = Stage("baseline", _train_baseline, ("training", *lengths), (weights("baseline"),))
    searched = arguments.target.takes_attempts
    trying = Stage("attempts", attempts.make_attempts, ("training", "sparsify", "cut", "finetune"))
    sparsify = attempts.take_sparsified if searched else prune_stages.sparsify
    cut = attempts.take_cut if searched else prune_stages.cut
    finetune = attempts.take_finetuned if searched else prune_stages.finetune
    return [
        dense,
        *([baseline] if arguments.trains_baseline else []),
        *([trying] if searched else []),
        Stage("sparsify", sparsify, ("training", "sparsify", "cut"), (weights("sparse"),)),
        Stage("cut", partial(_cut_and_test, cut), ("cut",), artifact("checkpoints/cut")),
        Stage(
            "finetune", partial(_finetune_and_test, finetune), ("training", "finetune"), artifact("pruned")
        ),
        Stage("export", _export, ("export", "benchmark.provider"), ("dense.onnx", "pruned.onnx")),
        Stage("benchmark", _benchmark, ("benchmark",)),
        Stage("report", _report, (), ("report.json", "report.html"), remakes=True),
    ]


def _train_dense(run: Run, tick: Callable[[], None]) -> DenseResult:
    """Train the dense model from the given or random weights; with no epochs, take them as they are."""
    model = build_model(run.recipe, len(run.inputs.data.class_names), weights=True)
    run.train(model, run.arguments.phases.dense, "dense", tick)
    run.keep_weights(model, "dense")
    data = run.inputs.data
    return DenseResult(
        data=DataFound(
            data.description,
            data.class_names,
            len(data.train),
            len(data.validation),
            len(data.test),
            run.recipe.data.labels,
        ),
        config=run.inputs.config,
        model_args=run.inputs.model_args,
        figures=None if run.arguments.trains_baseline else _dense_figures(run, model),
        commonest_answer=0.0 if run.recipe.data.labels else _commonest(run.images("test")),
        answers=() if run.factory is None else own_code.dense_answers(run),
    )


def _train_baseline(run: Run, tick: Callable[[], None]) -> BaselineResult:
    """Train the dense model on for the epochs and rates of the pruned one, without penalty and cut."""
    model, phases = run.weights("dense"), run.arguments.phases
    run.train(model, phases.sparsify, "baseline", tick)
    run.train(model, phases.finetune, "baseline-finetune", tick, first_epoch=phases.sparsify.epochs)
    run.keep_weights(model, "baseline")
    return BaselineResult(_dense_figures(run, model))


def _cut_and_test(
    cut: Callable[[Run, Callable[[], None]], CutResult], run: Run, tick: Callable[[], None]
) -> TestedCut:
    """Cut the sparse model, and compare both on the test images."""
    return TestedCut(cut(run, tick), _compare_on_test(run))


def _finetune_and_test(
    finetune: Callable[[Run, Callable[[], None]], tuple[nn.Module, PrunePlan]],
    run: Run,
    tick: Callable[[], None],
) -> FinetuneResult:
    """Fine-tune the cut model, test it once, save it as an artifact, and read that back."""
    model, plan = finetune(run, tick)
    accuracy = run.evaluate(model, run.images("test"))
    run.save_artifact(model, run.files.path / "pruned", plan, run.describe(test_accuracy=accuracy))
    round_trip = 0.0
    if run.files.writes:
        images = run.validation_images()
        round_trip = check_round_trip(model, run.files.path / "pruned", images, factory=run.factory)
    return FinetuneResult(accuracy, count_params(model), count_macs(model, run.example), round_trip)


def _export(run: Run, tick: Callable[[], None]) -> ExportResult | Nothing:
    """Export both models as ONNX, compare them with torch, and test them in ONNX Runtime; then in fewer bits."""
    if not run.files.writes:
        return Nothing()
    return ExportResult(
        _export_one(run, "dense", run.final_dense()),
        _export_one(run, "pruned", run.load_artifact(run.files.path / "pruned")),
        _export_variants(run),
    )


def _export_variants(run: Run) -> tuple[ExportedVariant, ...]:
    """Write the pruned model in fewer bits, and test it."""
    if not run.recipe.export.precisions:
        return ()
    with TemporaryDirectory() as folder:
        # Merged conv_groups are for the float32 kernels only.
        source = export_onnx(
            run.load_artifact(run.files.path / "pruned"),
            Path(folder) / "pruned.onnx",
            run.timed_example,
            opset=run.recipe.export.opset,
            merge_groups=False,
            metadata=read_metadata(run.files.path / "pruned.onnx"),
        )
        return tuple(_export_variant(run, source, one) for one in run.recipe.export.precisions)


def _export_variant(run: Run, source: Path, precision: Precision) -> ExportedVariant:
    path = run.files.path / f"pruned.{precision}.onnx"
    if precision == "int8":
        images = run.inputs.data.train
        n = min(run.recipe.export.calibration, len(images))
        chosen = np.random.default_rng(run.recipe.seed).permutation(len(images))[:n]
        loader = run.loader(images.subset(chosen), False)
        quantize_to_int8(source, path, (batch for batch, _ in loader))
    else:
        convert_to_fp16(source, path)
    test = run.loader(run.images("test"), False)
    accuracy = onnx_accuracy(path, test, threads=run.recipe.benchmark.threads)
    return ExportedVariant(precision, path.stat().st_size, accuracy)


def _export_one(run: Run, name: str, model: nn.Module) -> ExportedModel:
    spec = run.recipe.export
    path = run.files.path / f"{name}.onnx"
    tested = final_dense(run.files) if name == "dense" else run.files.result("finetune", FinetuneResult)
    write = partial(
        export_onnx,
        model.cpu(),
        opset=spec.opset,
        merge_groups=run.recipe.benchmark.provider == "cpu",
        metadata=metadata_texts(run.describe(test_accuracy=tested.accuracy)),
    )
    write(path, run.timed_example)
    if spec.dynamic_batch:
        write(run.files.path / f"{name}.dynamic.onnx", run.timed_example, dynamic_batch=True)
    parity = check_parity(model, path, run.validation_images().cpu())
    if not parity.max_rel <= _PARITY_LIMIT:
        raise VerificationError(
            f"{path} gives other logits than torch: they differ by {parity.max_rel:.2g} of the largest"
        )
    test = run.loader(run.images("test"), False)
    return ExportedModel(
        parity=parity,
        accuracy_onnx=onnx_accuracy(path, test, threads=run.recipe.benchmark.threads),
        onnx_bytes=path.stat().st_size,
        graph=summarise_graph(path),
    )


def _benchmark(run: Run, tick: Callable[[], None]) -> BenchmarkResult | Nothing:
    """Measure the latency of all files in ONNX Runtime, interleaved."""
    if not run.files.writes:
        return Nothing()
    spec = run.recipe.benchmark
    names = ["dense", "pruned", *(f"pruned.{precision}" for precision in run.recipe.export.precisions)]
    paths = [run.files.path / f"{name}.onnx" for name in names]
    compared = compare_latency(
        paths,
        threads=spec.threads,
        rounds=spec.rounds,
        warmup=spec.warmup,
        seed=run.recipe.seed,
        provider=spec.provider,
    )
    if not compared.trustworthy:
        run.say(f"benchmark: not trustworthy: {compared.reason}")
    return BenchmarkResult(compared, describe_machine(), library_versions())


def _report(run: Run, tick: Callable[[], None]) -> Nothing:
    if run.files.writes:
        write_report(run.files.path)
    return Nothing()


# -------------------------------------------------------------------------------------- what the stages share


def _dense_figures(run: Run, model: nn.Module) -> DenseFigures:
    """Return test accuracy, params and MACs of the dense model. It sees the test images in torch only here."""
    model.to(run.accelerator.device)
    accuracy = run.evaluate(model, run.images("test"))
    return DenseFigures(accuracy, count_params(model), count_macs(model, run.example))


def _commonest(images: Images) -> float:
    """Return the share of the images that have the commonest label."""
    return float(np.bincount(images.labels).max()) / len(images)


def _compare_on_test(run: Run) -> CutEffect:
    """Compare the sparse and the cut model on the test images: accuracies and the largest change of a logit."""
    device = run.accelerator.device
    sparse, pruned = run.weights("sparse"), run.load_artifact(run.files.checkpoints / "cut").to(device)
    change, largest, hits, count = 0.0, 0.0, [0, 0], 0
    with comparing(sparse), comparing(pruned):
        for images, labels in run.loader(run.images("test"), False):
            before, after = sparse(images.to(device)), pruned(images.to(device))
            change = max(change, float((before - after).abs().max()))
            largest = max(largest, float(before.abs().max()))
            for i, logits in enumerate((before, after)):
                hits[i] += int((logits.argmax(1).cpu() == labels).sum())
            count += len(labels)
    return CutEffect(hits[0] / count, hits[1] / count, change, largest)
