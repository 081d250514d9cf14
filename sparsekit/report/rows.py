"""What a report says, as rows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsekit.report import numbers
from sparsekit.report.schema import EpochCounts, IntervalFigures, ParityFigures, RunReport, VariantFigures


def main_rows(report: RunReport) -> list[_Row]:
    """Return the figures of the dense and the pruned model, one row for each, with the change."""
    dense, pruned = report.dense, report.pruned

    def row(label: str, show: Any, name: str, change: str) -> _Row:
        return _Row(label, show(getattr(dense, name)), show(getattr(pruned, name)), change)

    loss, loss_onnx = pruned.accuracy - dense.accuracy, pruned.accuracy_onnx - dense.accuracy_onnx
    size = numbers.change(dense.onnx_bytes / pruned.onnx_bytes, "smaller", "larger")
    return [
        row(
            "test accuracy" if report.data.labels else "agreement with dense",
            numbers.fraction,
            "accuracy",
            f"{loss:+.4f}",
        ),
        row("same, ONNX Runtime", numbers.fraction, "accuracy_onnx", f"{loss_onnx:+.4f}"),
        row("params", numbers.count, "params", numbers.change(report.params_ratio, "fewer", "more")),
        row("MACs", numbers.count, "macs", numbers.change(report.macs_ratio, "fewer", "more")),
        row("ONNX size", numbers.size, "onnx_bytes", size),
        row(
            "latency, median",
            lambda latency: numbers.milliseconds(latency.median),
            "latency_ms",
            _faster(report),
        ),
    ]


def findings(report: RunReport) -> list[tuple[str, str]]:
    """Return (label, text) of all that stands below the figures of the two models."""
    sparse = report.sparse
    speed = (
        numbers.significant(report.speed_efficiency, 2) if report.benchmark.trustworthy else "not trustworthy"
    )
    return [
        *([("asked for", _asked_text(report.asked, report.data.measure))] if report.asked else []),
        *_attempt_rows(report),
        ("speed-up", _speedup_text(report)),
        *((f"pruned, {variant.precision}", _variant_text(report, variant)) for variant in report.variants),
        ("speed efficiency", f"{speed} (speed-up / MACs ratio of {numbers.significant(report.macs_ratio)})"),
        ("near-zero channels", f"{sparse.near_zero_channels:,} of {sparse.channels:,}"),
        (
            f"{report.data.measure} at the cut",
            f"{numbers.fraction(sparse.accuracy_before_cut)} before, "
            f"{numbers.fraction(sparse.accuracy_after_cut)} after",
        ),
        (
            "largest logit change",
            f"{numbers.tiny(sparse.max_abs_logit_change)} (largest logit "
            f"{numbers.significant(sparse.max_abs_logit)})",
        ),
        ("parity, pruned", _parity_text(report.parity)),
        ("parity, dense", _parity_text(report.dense_parity)),
        *_graph_rows(report),
        ("saved and reloaded", f"logits differ by {numbers.tiny(report.round_trip_max_abs)}"),
        ("dense baseline", baseline_text(report.epochs)),
    ]


def baseline_text(epochs: EpochCounts) -> str:
    """Say for how long the dense model was trained, so that a reader can judge the comparison."""
    extra = epochs.sparsify + epochs.finetune
    if epochs.baseline > 0:
        total = f"{epochs.dense} + {epochs.baseline} epochs; pruned {epochs.dense} + {extra}"
        if epochs.baseline >= extra:
            return f"trained as long in total as the pruned model (dense {total})"
        return f"trained on, but shorter than the pruned model (dense {total})"
    start = (
        f"after {numbers.plural(epochs.dense, 'epoch')}"
        if epochs.dense
        else "as it was given, without training"
    )
    return f"taken {start}; the pruned model was trained for {numbers.plural(extra, 'further epoch')}"


def title_of(report: RunReport) -> str:
    """Name the model, its input size, the run and the number of test images in one line."""
    channels, height, width = report.input_shape
    size = f"{channels}×{height}×{width}"
    return (
        f"{report.model.name}, {size}, run {report.recipe}, {numbers.plural(report.data.test, 'test image')}"
    )


def interval_value(interval: IntervalFigures) -> str:
    """Write the estimate with as many decimals as its interval supports."""
    return f"{interval.value:.{_decimals(interval)}f}"


def interval_range(interval: IntervalFigures) -> str:
    """Write the ends of an interval, "1.21 to 1.32", with as many decimals as it supports."""
    digits = _decimals(interval)
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


@dataclass(frozen=True)
class _Row:
    label: str
    dense: str
    pruned: str
    change: str


def _faster(report: RunReport) -> str:
    if not report.benchmark.trustworthy:
        return "not trustworthy"
    if report.speedup.low <= 1 <= report.speedup.high:
        return "no difference"
    if report.speedup.value < 1:
        return numbers.change(report.speedup.value, "faster", "slower")
    return f"{interval_value(report.speedup)}× faster"


def _asked_text(asked: Mapping[str, float], measure: str) -> str:
    phrases = {
        "speedup": "a speed-up of {:g}",
        "latency_ms": "{:g} ms",
        "max_accuracy_drop": f"at most {{:g}} of validation {measure} lost",
    }
    return ", ".join(phrases.get(key, f"{{:g}} of the {key}").format(value) for key, value in asked.items())


def _attempt_rows(report: RunReport) -> list[tuple[str, str]]:
    rows = []
    for attempt in report.attempts:
        measured = "" if attempt.speedup is None else f", measured {numbers.significant(attempt.speedup)}"
        verdict = "taken" if attempt.taken else "within the budget" if attempt.accepted else "too much"
        outcome = attempt.failure
        if attempt.accuracy is not None:
            outcome = (
                f"validation {report.data.measure} {numbers.fraction(attempt.accuracy)}, {-attempt.drop:+.4f} against "
                f"dense; {verdict}"
            )
        rows.append(
            (
                f"attempt {attempt.number}",
                f"{_asked_text(attempt.target, report.data.measure)}{measured}: {outcome}",
            )
        )
    return [*rows, *([("limited by", report.binds)] if report.binds else [])]


def _speedup_text(report: RunReport) -> str:
    speedup, null, benchmark = report.speedup, report.null, report.benchmark
    measured = f"{interval_value(speedup)} (95 % interval {interval_range(speedup)})"
    itself = f"dense against itself: {interval_value(null)} ({interval_range(null)})"
    if not benchmark.trustworthy:
        reason = benchmark.reason or "the benchmark was too noisy"
        return f"not trustworthy: {reason}; measured {measured}, {itself}"
    return f"{measured}, batch {benchmark.batch}, {numbers.plural(benchmark.threads, 'thread')}; {itself}"


def _variant_text(report: RunReport, variant: VariantFigures) -> str:
    speed = f"{interval_value(variant.speedup)} times as fast as dense ({interval_range(variant.speedup)})"
    return (
        f"{speed if report.benchmark.trustworthy else 'speed-up not trustworthy'}, {report.data.measure} "
        f"{numbers.fraction(variant.accuracy_onnx)}, {numbers.milliseconds(variant.latency_ms.median)}, "
        f"{numbers.size(variant.onnx_bytes)}"
    )


def _parity_text(parity: ParityFigures) -> str:
    return (
        f"{numbers.tiny(parity.max_rel)} of the largest logit ({numbers.tiny(parity.max_abs)} absolute), "
        f"same class for {numbers.fraction(parity.top1_agreement)} of the images"
    )


def _graph_rows(report: RunReport) -> list[tuple[str, str]]:
    if report.dense_graph is None or report.pruned_graph is None:
        return []
    texts = [
        f"{graph.blocked} of {numbers.plural(graph.blocked + graph.plain, 'convolution')} in the blocked layout, "
        f"{numbers.plural(graph.reorders, 'reorder')}, {graph.activations + graph.norms} not fused"
        for graph in (report.pruned_graph, report.dense_graph)
    ]
    return [("graph, pruned", texts[0]), *([("graph, dense", texts[1])] if texts[1] != texts[0] else [])]


def _decimals(interval: IntervalFigures) -> int:
    """Count the decimals that show one digit of the half-width of an interval; at most three."""
    half = (interval.high - interval.low) / 2
    return min(3, max(0, -math.floor(math.log10(half)))) if half > 0 else 2
